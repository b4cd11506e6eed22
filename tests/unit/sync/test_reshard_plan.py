"""The resharding plan, played out on real tensors: every engine rank ends with its slices, each byte once."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlvr.sync.plan import ReshardPlan, TrainerLayout, build_plan, place_on_nodes
from megatron_rlvr.sync.plan_report import LinkRates, as_json, count_cost, describe, lower_bound_seconds
from megatron_rlvr.weights.engine_slices import EngineLayout, engine_boxes, expert_box
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.slices import Box, box_index, box_shape, load_shard, prove_exact_cover

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "models"

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
TIED = {**DENSE, "tie_word_embeddings": True}

CASES = [
    (DENSE, Layout(tp=2, pp=2), 1, EngineLayout(tp=2)),
    (DENSE, Layout(tp=2, pp=2), 2, EngineLayout(tp=1, replicas=3)),
    (DENSE, Layout(tp=1, pp=4), 1, EngineLayout(tp=8, replicas=2)),
    (DENSE, Layout(tp=8), 1, EngineLayout(tp=4)),
    (DENSE, Layout(tp=4, pp=2, vpp=2), 3, EngineLayout(tp=2, replicas=5)),
    (TIED, Layout(tp=2, pp=2), 1, EngineLayout(tp=4, replicas=2)),
    (MOE, Layout(tp=2, pp=2, ep=4), 2, EngineLayout(tp=4, replicas=2)),
    (MOE, Layout(tp=2, ep=2, etp=2), 2, EngineLayout(tp=4, ep=2, replicas=2)),
    (MOE, Layout(pp=2, ep=2), 8, EngineLayout(tp=8, ep=8)),
]


class DictReader:
    """Slices of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self.tensors[name][box_index(box)]


def random_model(mapping: Mapping) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in mapping.hf_tensors().items()}


def trainer_slices(
    mapping: Mapping, trainer: TrainerLayout, model: dict[str, torch.Tensor]
) -> dict[int, dict[str, list[tuple[Box, torch.Tensor]]]]:
    """What each trainer rank holds, cut out of its Megatron shards: rank -> tensor -> rectangles with values."""
    held: dict[int, dict[str, list[tuple[Box, torch.Tensor]]]] = defaultdict(lambda: defaultdict(list))
    layout, reader = trainer.layout, DictReader(model)
    for pp, vpp in mapping.chunks():
        for index, rank in enumerate(trainer.stage_ranks(pp)):
            # Megatron's order: tp (or etp) varies fastest, then ep, then data parallel.
            tp, etp, ep = index % layout.tp, index % layout.etp, index // layout.etp % layout.ep
            for spec in mapping.shards(tp, pp, vpp, ep, etp_rank=etp).values():
                shard = load_shard(spec, reader)
                for piece in spec.slices:
                    held[rank][piece.hf_name].append((piece.hf_box, shard[box_index(piece.shard_box)]))
    return held


def cut_out(holdings: list[tuple[Box, torch.Tensor]], box: Box) -> torch.Tensor:
    for have, values in holdings:
        if all(a <= c and d <= b for (a, b), (c, d) in zip(have, box, strict=True)):
            inner = tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(have, box, strict=True))
            return values[inner]
    raise AssertionError(f"{box} is not held whole")


def shifted(box: Box, whole: Box) -> Box:
    """The rectangle in coordinates of the larger one."""
    return tuple((c - a, d - a) for (a, _), (c, d) in zip(whole, box, strict=True))


def wanted_boxes(mapping: Mapping, engine: EngineLayout) -> list[dict[str, Box]]:
    """Rectangles of each tensor-parallel rank of a server."""
    wanted: list[dict[str, Box]] = [{} for _ in range(engine.tp)]
    whole = Mapping(mapping.shape, layout=Layout(), naming="local")
    for param in whole.params():
        for part, (name, shape) in enumerate(param.hf):
            if param.expert_index is None:
                boxes = engine_boxes(param.kind, part, shape, engine.tp, param.groups)
            else:
                experts = mapping.shape.num_experts
                boxes = expert_box(param.kind, part, shape, param.expert_index, experts, engine)
            for rank, box in enumerate(boxes):
                if box is not None:
                    wanted[rank][name] = box
    return wanted


@pytest.mark.parametrize(("config", "layout", "dp", "engine"), CASES)
def test_plan_moves_every_slice_to_its_engine_ranks(
    config: dict[str, Any], layout: Layout, dp: int, engine: EngineLayout
) -> None:
    mapping = Mapping(ModelShape.from_hf(config), layout=layout, naming="local")
    plan = build_plan(mapping, dp=dp, engine=engine, bytes_per_element=4, bucket_bytes=4096, gpus_per_node=4)
    model = random_model(mapping)
    held = trainer_slices(mapping, plan.trainer, model)
    received: dict[int, list[tuple[str, Box, torch.Tensor]]] = defaultdict(list)
    for bucket in plan.buckets:
        assert bucket.num_bytes <= 4096
        values = [cut_out(held[bucket.source][piece.hf_name], piece.box) for piece in bucket.slices]
        assert sum(value.numel() for value in values) * 4 == bucket.num_bytes
        have = {bucket.source}
        for hop in plan.hops(bucket):
            assert hop.sender in have, "a rank forwards what it has not received"
            assert hop.receiver not in have, "a rank receives a bucket twice"
            have.add(hop.receiver)
            received[hop.receiver] += [(p.hf_name, p.box, v) for p, v in zip(bucket.slices, values, strict=True)]
    for replica, (tp_rank, boxes) in itertools.product(
        range(engine.replicas), enumerate(wanted_boxes(mapping, engine))
    ):
        pieces: dict[str, list[tuple[Box, torch.Tensor]]] = defaultdict(list)
        for name, box, values in received[plan.engine_rank(replica, tp_rank)]:
            pieces[name].append((box, values))
        assert pieces.keys() == boxes.keys()
        for name, whole in boxes.items():
            moved = [
                tuple((c - a, d - a) for (a, _), (c, d) in zip(whole, box, strict=True)) for box, _ in pieces[name]
            ]
            prove_exact_cover(name, box_shape(whole), moved)
            assembled = torch.empty(box_shape(whole))
            for box, (_, values) in zip(moved, pieces[name], strict=True):
                assembled[box_index(box)] = values
            assert torch.equal(assembled, model[name][box_index(whole)])


@pytest.mark.parametrize(("config", "layout", "dp", "engine"), CASES)
def test_costs_are_those_of_the_messages(config: dict[str, Any], layout: Layout, dp: int, engine: EngineLayout) -> None:
    mapping = Mapping(ModelShape.from_hf(config), layout=layout, naming="local")
    plan = build_plan(mapping, dp=dp, engine=engine, bucket_bytes=4096, gpus_per_node=4)
    cost = count_cost(plan)
    sent: Counter[tuple[int, bool]] = Counter()
    received: Counter[tuple[int, bool]] = Counter()
    for bucket in plan.buckets:
        left_node: Counter[int] = Counter()
        for hop in plan.hops(bucket):
            sent[hop.sender, hop.inter_node] += bucket.num_bytes
            received[hop.receiver, hop.inter_node] += bucket.num_bytes
            if hop.inter_node:
                left_node[int(plan.node_of_rank[hop.sender])] += 1
        assert all(count == 1 for count in left_node.values()), "a byte leaves a node once"
    for rank in range(plan.num_ranks):
        assert cost.sent_intra[rank] == sent[rank, False]
        assert cost.sent_inter[rank] == sent[rank, True]
        assert cost.received_intra[rank] == received[rank, False]
        assert cost.received_inter[rank] == received[rank, True]
    for tp_rank, boxes in enumerate(wanted_boxes(mapping, engine)):
        needed = 2 * sum(math.prod(box_shape(box)) for box in boxes.values())
        for replica in range(engine.replicas):
            assert cost.received[plan.engine_rank(replica, tp_rank)] == needed
    assert cost.received_over_bound() == 1.0
    rates = LinkRates(intra_gb_per_s=1.0, inter_gb_per_s=0.5, latency_s=0.0)
    assert cost.predicted_seconds(rates) >= lower_bound_seconds(plan, cost, rates) * (1 - 1e-9)


def test_data_parallel_replicas_take_turns() -> None:
    mapping = Mapping(ModelShape.from_hf(DENSE), layout=Layout(tp=2, pp=2), naming="local")
    plan = build_plan(mapping, dp=4, engine=EngineLayout(tp=2, replicas=2), bucket_bytes=1024)
    cost = count_cost(plan)
    sent = (cost.sent_intra + cost.sent_inter)[: plan.trainer.num_ranks]
    for pp_rank, tp_rank in itertools.product(range(2), range(2)):
        shares = sent[list(plan.trainer.dense_holders(pp_rank, tp_rank))]
        assert shares.max() - shares.min() <= 2 * 1024


def test_shard_to_shard_moves_about_half_of_a_broadcast() -> None:
    """Trainer TP2 x PP2 to engine TP2: at most 60% of what broadcasting whole tensors moves."""
    mapping = Mapping(ModelShape.from_hf(CONFIGS / "qwen3-8b.json"), layout=Layout(tp=2, pp=2), naming="local")
    cost = count_cost(build_plan(mapping, dp=1, engine=EngineLayout(tp=2)))
    assert cost.model_bytes == 2 * 8_190_735_360
    assert cost.received.max() / cost.model_bytes == pytest.approx(0.5, abs=1e-3)


def test_thousands_of_ranks() -> None:
    """235B from 1,024 trainer ranks to 256 servers of 8."""
    shape = ModelShape.from_hf(CONFIGS / "qwen3-235b-a22b.json")
    mapping = Mapping(shape, layout=Layout(tp=4, pp=2, ep=32), naming="te", grouped_experts=True)
    plan = build_plan(mapping, dp=128, engine=EngineLayout(tp=8, replicas=256))
    cost = count_cost(plan)
    assert cost.received_over_bound() == 1.0
    # Every byte of the model leaves the trainer's nodes exactly once.
    assert (cost.sent_inter + cost.sent_intra)[:1024].sum() == cost.model_bytes == 2 * 235_093_634_560
    assert cost.sent_intra[:1024].sum() == 0
    text = describe(plan, cost, LinkRates())
    assert "1024 ranks on 128 nodes" in text
    assert "1.000 of what it holds, 12.5% of a broadcast" in text


def test_engines_get_their_own_nodes_unless_all_fit_on_one() -> None:
    assert place_on_nodes(4, 4, 8).tolist() == [0] * 8
    assert place_on_nodes(6, 4, 4).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_json_holds_the_whole_plan() -> None:
    mapping = Mapping(ModelShape.from_hf(DENSE), layout=Layout(tp=2), naming="local")
    plan = build_plan(mapping, dp=1, engine=EngineLayout(tp=4, replicas=2), bucket_bytes=4096, gpus_per_node=2)
    cost = count_cost(plan)
    content = json.loads(json.dumps(as_json(plan, cost, LinkRates())))
    assert content["ranks"]["needed"] == cost.needed.tolist()
    assert len(content["buckets"]) == len(plan.buckets)
    elements: Counter[str] = Counter()
    for bucket in content["buckets"]:
        assert sorted(itertools.chain(*bucket["chain"])) == sorted(
            plan.engine_rank(replica, rank)
            for replica in range(2)
            for rank in plan.buckets[content["buckets"].index(bucket)].engine_tp_ranks
        )
        for name, box in bucket["slices"]:
            elements[name] += math.prod(stop - start for start, stop in box)
    assert elements == Counter({name: math.prod(shape) for name, shape in mapping.hf_tensors().items()})


def test_the_last_bucket_travels_the_whole_chain() -> None:
    """Predicted seconds by hand: one bucket, two servers of one rank on nodes of their own."""
    mapping = Mapping(ModelShape.from_hf(TIED), layout=Layout(), naming="local")
    plan = build_plan(mapping, dp=1, engine=EngineLayout(replicas=2), gpus_per_node=1)
    assert len(plan.buckets) == 1
    cost = count_cost(plan)
    assert cost.longest_chain == (2, 0)
    assert cost.messages.tolist() == [1, 2, 1]
    rates = LinkRates(inter_gb_per_s=1e-3, intra_gb_per_s=1.0, latency_s=0.5)
    size = cost.model_bytes / 1e6
    # The busiest link carries the model once, the second server waits for one more hop; 2 messages and 2 hops.
    assert cost.predicted_seconds(rates) == pytest.approx(2 * size + 0.5 * 4)
    assert lower_bound_seconds(plan, cost, rates) == pytest.approx(size)


@pytest.mark.parametrize(
    ("layout", "dp", "engine", "message"),
    [
        (Layout(tp=2), 1, EngineLayout(tp=3), r"engine tp must divide num_attention_heads \(8\), got 3"),
        (Layout(tp=2), 0, EngineLayout(), "dp must be at least 1, got 0"),
        (Layout(tp=2, ep=4), 1, EngineLayout(), r"tp \* dp \(2\) must be a multiple of ep \* etp \(4\)"),
        (Layout(tp=2), 1, EngineLayout(tp=4, ep=3), r"engine ep must divide engine tp \(4\), got 3"),
        (Layout(tp=2), 1, EngineLayout(replicas=0), "engine replicas must be at least 1, got 0"),
    ],
)
def test_impossible_layouts_are_refused(layout: Layout, dp: int, engine: EngineLayout, message: str) -> None:
    mapping = Mapping(ModelShape.from_hf(MOE), layout=layout, naming="local")
    with pytest.raises(ValueError, match=message):
        build_plan(mapping, dp=dp, engine=engine)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reshard_plan.py"), *arguments],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_tool_prints_and_writes_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run_tool(
        "qwen3-30b-a3b", "--trainer", "tp=4,pp=4,dp=2,ep=8", "--engine", "tp=8,replicas=4", "--json", str(out)
    )
    assert result.returncode == 0, result.stderr
    assert "tp=4 pp=4 vpp=1 dp=2 ep=8 etp=1: 32 ranks on 4 nodes" in result.stdout
    assert "tp=8 ep=1 replicas=4: 32 ranks on 4 nodes" in result.stdout
    assert "predicted" in result.stdout
    content = json.loads(out.read_text())
    assert sum(content["ranks"]["sent_inter"][:32]) == 2 * 30_532_122_624
    assert np.array(content["ranks"]["needed"][32:]).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("qwen3-8b", "--trainer", "tp=5", "--engine", "tp=8"),
            "parallel.tp must divide num_attention_heads (32), got 5",
        ),
        (("qwen3-8b", "--trainer", "tp=4,xp=2", "--engine", "tp=8"), "--trainer must be like tp=4,pp=2 (of tp,"),
        (("nowhere", "--trainer", "tp=4", "--engine", "tp=8"), "nowhere does not exist"),
        (
            ("qwen3-8b", "--trainer", "tp=4", "--engine", "tp=8", "--inter-gb-per-s", "0"),
            "inter_gb_per_s must be positive",
        ),
    ],
)
def test_tool_names_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = run_tool(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def plan_of(config: dict[str, Any], layout: Layout, engine: EngineLayout) -> ReshardPlan:
    return build_plan(Mapping(ModelShape.from_hf(config), layout=layout, naming="local"), dp=2, engine=engine)


def test_the_same_layouts_give_the_same_plan() -> None:
    first, second = (plan_of(MOE, Layout(tp=2, ep=4), EngineLayout(tp=4, replicas=3)) for _ in range(2))
    assert first.buckets == second.buckets
