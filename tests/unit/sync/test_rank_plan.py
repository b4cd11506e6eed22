"""A plan seen from single ranks: placements that travel, refusals by name, steps that never wait in a circle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlvr.sync.exchange import Step, difference
from megatron_rlvr.sync.plan import ReshardPlan, build_plan
from megatron_rlvr.sync.rank_plan import Placement, pack_bucket, place_buckets, steps_by_rank, talking_pairs
from megatron_rlvr.weights.engine_params import engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.slices import Box, box_index

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 130,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
SHAPE = ModelShape.from_hf(CONFIG)
ENGINE = EngineLayout(tp=4, replicas=2)


@pytest.fixture(scope="module")
def plan() -> ReshardPlan:
    mapping = Mapping(SHAPE, layout=Layout(tp=2, pp=2), naming="local")
    return build_plan(mapping, dp=1, engine=ENGINE, bytes_per_element=4, bucket_bytes=4096, gpus_per_node=4)


@pytest.fixture(scope="module")
def placement(plan: ReshardPlan) -> Placement:
    return place_buckets(plan, engine_places(SHAPE, ENGINE, 3), tp_rank=3, dtype="float32")


def parameters(placement: Placement) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, torch.nan) for name, shape in placement.params}


def test_a_placement_survives_the_journey_and_fills_the_rank(plan: ReshardPlan, placement: Placement) -> None:
    arrived = Placement.from_json(placement.to_json())
    assert arrived == placement
    held = parameters(arrived)
    arrived.check(held)
    sizes = Mapping(SHAPE, layout=Layout(), naming="local").hf_tensors()
    numbered = {name: torch.arange(torch.Size(size).numel()).float().view(size) for name, size in sizes.items()}

    def rectangle(name: str, box: Box) -> torch.Tensor:
        return numbered[name][box_index(box)]

    for tag in arrived.buckets:
        flat = torch.empty(plan.buckets[tag].num_bytes, dtype=torch.uint8)
        pack_bucket(plan.buckets[tag], flat, rectangle, torch.float32)
        arrived.store(tag, flat, held)
    # The last of four ranks: query head 3, key head 1 (which it shares), the last rows of gate and up.
    qkv = held["model.layers.1.self_attn.qkv_proj.weight"]
    assert torch.equal(qkv[:8], numbered["model.layers.1.self_attn.q_proj.weight"][24:])
    assert torch.equal(qkv[8:16], numbered["model.layers.1.self_attn.k_proj.weight"][8:])
    gate_up = held["model.layers.0.mlp.gate_up_proj.weight"]
    assert torch.equal(gate_up[12:], numbered["model.layers.0.mlp.up_proj.weight"][36:])
    # 130 words are padded to 256 rows: the last rank has none of them.
    assert held["lm_head.weight"].isnan().all()
    assert set(arrived.padded) == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("model.norm.weight"), r"no \['model.norm.weight'\] and the plan no \[\]"),
        (lambda held: held.update(bias=torch.zeros(1)), r"no \[\] and the plan no \['bias'\]"),
        (
            lambda held: held.update({"model.norm.weight": torch.zeros(33)}),
            r"model.norm.weight must have shape \(32,\) for this plan, got \(33,\)",
        ),
        (
            lambda held: held.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            r"model.norm.weight must be a plain .* tensor, got torch.int8",
        ),
    ],
    ids=["missing", "extra", "shape", "quantised"],
)
def test_other_parameters_are_refused_by_name(change, message: str, placement: Placement) -> None:
    held = parameters(placement)
    change(held)
    with pytest.raises(ValueError, match=message):
        placement.check(held)


def test_a_plan_that_leaves_something_out_is_refused(placement: Placement) -> None:
    first = min(placement.buckets)
    short = replace(placement, buckets={tag: slices for tag, slices in placement.buckets.items() if tag != first})
    with pytest.raises(ValueError, match=r"the plan fills \d+ of \d+ elements of model"):
        short.check(parameters(placement))


def test_steps_tell_both_ends_of_every_message(plan: ReshardPlan) -> None:
    steps = steps_by_rank(plan, range(plan.num_ranks))
    sent = [(rank, to, step.tag) for rank, own in steps.items() for step in own for to in step.receivers]
    received = [(step.sender, rank, step.tag) for rank, own in steps.items() for step in own if step.sender is not None]
    assert sorted(sent) == sorted(received)
    assert all([step.tag for step in own] == sorted(step.tag for step in own) for own in steps.values())
    assert talking_pairs(steps) == sorted({(min(a, b), max(a, b)) for a, b, _ in sent})


def test_ranks_that_stand_for_engine_ranks_send_nothing_to_themselves(plan: ReshardPlan) -> None:
    """Four trainer ranks beside the first server's ranks, and beside the second's."""
    steps = steps_by_rank(plan, [*range(4), *range(4), *range(4)])
    assert all(rank not in step.receivers and step.sender != rank for rank, own in steps.items() for step in own)
    for rank, own in steps.items():
        taken = {step.tag for step in own if step.takes}
        wanted = {tag for tag, bucket in enumerate(plan.buckets) if rank in bucket.engine_tp_ranks}
        assert taken == wanted


@pytest.mark.parametrize("byte", [0, 7, 100, 111])
def test_a_flipped_byte_makes_a_difference(byte: int) -> None:
    message = torch.randint(0, 256, (112,), dtype=torch.uint8)
    words = message.view(torch.int64)
    words[-1] = words[:-1].sum()
    assert int(difference(message)) == 0
    message[byte] ^= 1 << (byte % 8)
    assert int(difference(message)) != 0


def test_a_message_is_a_bucket_in_words_and_a_checksum() -> None:
    sizes = [Step(tag=0, sender=None, receivers=(), num_bytes=n, takes=True).message_bytes for n in (1, 8, 9)]
    assert sizes == [16, 16, 24]
