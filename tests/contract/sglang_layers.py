"""Loads one tensor of each kind through SGLang's own layers for every rank; prints which elements each rank kept.

Usage: python sglang_layers.py '[2, 4, 8]' (tensor-parallel sizes). The model: 8 query and 2 key heads of 16, hidden
32, MLP 48, vocabulary 200. Every tensor holds its element numbers, so the kept ones name their places.
"""

from __future__ import annotations

import inspect
import json
import sys
from types import SimpleNamespace

import torch

from megatron_rlvr.rollout import platform

platform.install()

from sglang.srt.layers import linear, vocab_parallel_embedding  # noqa: E402
from sglang.srt.layers.linear import (  # noqa: E402
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

HEADS, GROUPS, HEAD_DIM, HIDDEN, FFN, VOCAB = 8, 2, 16, 32, 48, 200


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def kept(weight: torch.Tensor) -> list[list[int]]:
    return weight.detach().long().tolist()


def rank_slices(tp: int, rank: int) -> dict[str, list[list[int]]]:
    """Element numbers of each Hugging Face tensor on one rank, as a matrix."""
    slices = {}
    # Layers ask the running server for its rank; there is none here. Up to 0.5.21 linear ones want to be told instead.
    parallel = SimpleNamespace(tp_rank=rank, tp_size=tp, tp_group=None)
    vocab_parallel_embedding.get_parallel = linear.get_parallel = lambda: parallel
    told = "tp_rank" in inspect.signature(QKVParallelLinear).parameters
    place = {"tp_rank": rank, "tp_size": tp} if told else {}
    qkv = QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, GROUPS, bias=False, **place)
    start = 0
    for part, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
        qkv.weight_loader(qkv.weight, numbered(rows * HEAD_DIM, HIDDEN), part)
        length = max(1, rows // tp) * HEAD_DIM
        slices[part] = kept(qkv.weight[start : start + length])
        start += length
    gate_up = MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False, **place)
    for index, part in enumerate(("gate", "up")):
        gate_up.weight_loader(gate_up.weight, numbered(FFN, HIDDEN), index)
        slices[part] = kept(gate_up.weight[index * FFN // tp : (index + 1) * FFN // tp])
    down = RowParallelLinear(FFN, HIDDEN, bias=False, **place)
    down.weight_loader(down.weight, numbered(HIDDEN, FFN))
    slices["down"] = kept(down.weight)
    embedding = vocab_parallel_embedding.VocabParallelEmbedding(VOCAB, HIDDEN)
    embedding.weight_loader(embedding.weight, numbered(VOCAB, HIDDEN))
    slices["embedding"] = kept(embedding.weight[: embedding.shard_indices.num_org_elements])
    return slices


if __name__ == "__main__":
    result = {str(tp): [rank_slices(tp, rank) for rank in range(tp)] for tp in json.loads(sys.argv[1])}
    print(json.dumps(result))
