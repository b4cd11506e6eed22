"""Slices of real transformers models into Megatron shards and back, bit by bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointReader
from megatron_rlvr.weights.slices import load_shard

ModelFolder = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]

DENSE = ["qwen2", "qwen2_tied", "qwen3", "llama", "llama_tied", "mistral"]
DENSE_LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=4, pp=2),
    Layout(tp=8),
    Layout(pp=4),
    Layout(tp=2, pp=2, vpp=2),
    Layout(pp=2, vpp=4),
]
MOE_LAYOUTS = [*DENSE_LAYOUTS, Layout(ep=4), Layout(tp=2, pp=2, ep=2), Layout(tp=2, ep=2, etp=2), Layout(pp=4, ep=8)]


def load_everywhere(folder: Path, mapping: Mapping) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
    """Every rank's tensors: (pp, vpp, ep) of the chunk, tp rank (etp rank for experts) -> name -> shard."""
    ranks: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    layout = mapping.layout
    with CheckpointReader(folder) as reader:
        for (pp, vpp), ep in itertools.product(mapping.chunks(), range(layout.ep)):
            for rank in range(max(layout.tp, layout.etp)):
                specs = mapping.shards(rank % layout.tp, pp, vpp, ep, etp_rank=rank % layout.etp)
                ranks[pp, vpp, ep, rank] = {name: load_shard(spec, reader) for name, spec in specs.items()}
    return ranks


def gather_everything(
    mapping: Mapping, ranks: dict[tuple[int, ...], dict[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    tensors = []
    for (pp, vpp), ep in itertools.product(mapping.chunks(), range(mapping.layout.ep)):
        for param in mapping.params(pp, vpp, ep):
            if param.expert or ep == 0:
                tensors += param.gather([ranks[pp, vpp, ep, r][param.name] for r in range(param.num_shards)])
    return tensors


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in DENSE for layout in DENSE_LAYOUTS]
    + [(family, layout) for family in ("qwen3_moe", "qwen3_moe_mixed") for layout in MOE_LAYOUTS],
    ids=str,
)
def test_shards_of_a_real_model_gather_to_the_same_bits(family: str, layout: Layout, model_folder: ModelFolder) -> None:
    folder, original = model_folder(family)
    mapping = Mapping(ModelShape.from_hf(folder), layout=layout, naming="te" if layout.pp == 2 else "local")
    tensors = gather_everything(mapping, load_everywhere(folder, mapping))
    names = [name for name, _ in tensors]
    assert sorted(names) == sorted(original)
    for name, tensor in tensors:
        assert tensor.is_contiguous()
        assert torch.equal(tensor, original[name]), name


def test_qkv_shards_hold_whole_groups(model_folder: ModelFolder) -> None:
    """Against Megatron's own view of the joined projection: [groups, queries per group + key + value, head]."""
    folder, original = model_folder("qwen3")
    shape = ModelShape.from_hf(folder)
    mapping = Mapping(shape, layout=Layout(tp=2), naming="local")
    with CheckpointReader(folder) as reader:
        shard = load_shard(mapping.shards(1)["decoder.layers.3.self_attention.linear_qkv.weight"], reader)
    heads = shard.view(2, 4, 16, 32)  # 2 of 4 groups, 2 queries + key + value, head_dim, hidden
    query, key, value = (original[f"model.layers.3.self_attn.{part}_proj.weight"] for part in "qkv")
    for local, group in enumerate((2, 3)):
        assert torch.equal(heads[local, 0], query[(2 * group) * 16 : (2 * group + 1) * 16])
        assert torch.equal(heads[local, 1], query[(2 * group + 1) * 16 : (2 * group + 2) * 16])
        assert torch.equal(heads[local, 2], key[group * 16 : (group + 1) * 16])
        assert torch.equal(heads[local, 3], value[group * 16 : (group + 1) * 16])


def test_fewer_groups_than_ranks_cut_the_joined_rows(model_folder: ModelFolder) -> None:
    """tp = 8 over 4 groups: Megatron gathers activations, so a rank holds half of "q q k v" of its group."""
    folder, original = model_folder("qwen3")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=8), naming="local")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    with CheckpointReader(folder) as reader:
        even, odd = (load_shard(mapping.shards(rank)[name], reader) for rank in (2, 3))
    query, key, value = (original[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(even, query[32:64])
    assert torch.equal(odd, torch.cat([key[16:32], value[16:32]]))


def test_gate_stands_above_up_on_every_rank(model_folder: ModelFolder) -> None:
    folder, original = model_folder("llama")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=4), naming="local")
    with CheckpointReader(folder) as reader:
        shard = load_shard(mapping.shards(2)["decoder.layers.1.mlp.linear_fc1.weight"], reader)
    gate, up = (original[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(shard, torch.cat([gate[24:36], up[24:36]]))


def test_vocabulary_is_padded_with_zero_rows(model_folder: ModelFolder) -> None:
    folder, original = model_folder("qwen3")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=2), naming="local")
    assert mapping.padded_vocab_size == 256
    with CheckpointReader(folder) as reader:
        shard = load_shard(mapping.shards(1)["output_layer.weight"], reader, dtype=torch.bfloat16)
    assert shard.dtype is torch.bfloat16
    assert torch.equal(shard[:72], original["lm_head.weight"][128:].bfloat16())
    assert not shard[72:].any()


def test_a_rank_behind_the_vocabulary_is_all_padding(model_folder: ModelFolder) -> None:
    folder, _ = model_folder("qwen3")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=4), naming="local", padded_vocab_size=400)
    with CheckpointReader(folder) as reader:
        shard = load_shard(mapping.shards(3)["output_layer.weight"], reader, dtype=torch.float32)
        assert shard.shape == (100, 32)
        assert not shard.any()
    coverage = mapping.prove_complete()
    assert coverage.num_padding_elements == 2 * 200 * 32


def test_tied_output_layer_is_a_copy_on_the_last_stage_only(model_folder: ModelFolder) -> None:
    folder, original = model_folder("qwen2_tied")
    shape = ModelShape.from_hf(folder)
    one_stage = Mapping(shape, layout=Layout(vpp=1), naming="local").shards()
    assert "output_layer.weight" not in one_stage
    mapping = Mapping(shape, layout=Layout(pp=2), naming="local")
    assert "output_layer.weight" not in mapping.shards(pp_rank=0)
    with CheckpointReader(folder) as reader:
        copy = load_shard(mapping.shards(pp_rank=1)["output_layer.weight"], reader)
    assert torch.equal(copy[:200], original["model.embed_tokens.weight"])
    last = next(param for param in mapping.params(pp_rank=1) if param.name == "output_layer.weight")
    assert last.duplicate
    assert last.gather([copy]) == []
    assert mapping.prove_complete().num_duplicate_elements == 256 * 32


def test_grouped_experts_hold_the_same_slices_as_sequential_ones(model_folder: ModelFolder) -> None:
    folder, _ = model_folder("qwen3_moe")
    shape = ModelShape.from_hf(folder)
    layout = Layout(ep=4)
    sequential = Mapping(shape, layout=layout, naming="te").shards(ep_rank=3)
    grouped = Mapping(shape, layout=layout, naming="te", grouped_experts=True).shards(ep_rank=3)
    prefix = "decoder.layers.2.mlp.experts."
    assert grouped[prefix + "linear_fc1.weight1"] == sequential[prefix + "local_experts.1.linear_fc1.weight"]
    # Local expert 1 of the last of 4 ranks is expert 7 of 8.
    names = [piece.hf_name for piece in grouped[prefix + "linear_fc1.weight1"].slices]
    assert names == [f"model.layers.2.mlp.experts.7.{part}_proj.weight" for part in ("gate", "up")]
    assert len(grouped) == len(sequential)


def test_gather_refuses_shards_of_another_layout(model_folder: ModelFolder) -> None:
    folder, _ = model_folder("qwen3")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=2), naming="local")
    param = next(param for param in mapping.params() if param.name.endswith("linear_fc2.weight"))
    with pytest.raises(ValueError, match=r"linear_fc2.weight: shards must be 2 of shape \(32, 24\)"):
        param.gather([torch.zeros(32, 12)] * 4)


def test_gather_fills_memory_that_is_given(model_folder: ModelFolder) -> None:
    """A bucket used again and again: results lie one behind the other in it."""
    folder, original = model_folder("qwen3")
    mapping = Mapping(ModelShape.from_hf(folder), layout=Layout(tp=2), naming="local")
    bucket = torch.full((sum(tensor.numel() for tensor in original.values()),), float("nan"))
    used = 0

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal used
        assert dtype is torch.float32
        used += math.prod(shape)
        return bucket[used - math.prod(shape) : used].view(shape)

    gathered: list[tuple[str, torch.Tensor]] = []
    with CheckpointReader(folder) as reader:
        for param in mapping.params():
            shards = [load_shard(param.shard(rank), reader) for rank in range(param.num_shards)]
            gathered += param.gather(shards, into=take)
    assert used == bucket.numel()
    assert torch.equal(torch.cat([tensor.flatten() for _, tensor in gathered]), bucket)
    assert all(torch.equal(tensor, original[name]) for name, tensor in gathered)
