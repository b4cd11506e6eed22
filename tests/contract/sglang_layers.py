"""Loads one tensor of each kind through SGLang's own layers for every rank; prints which elements each rank kept.

Usage: python sglang_layers.py '[2, 4, 8]' (tensor-parallel sizes). The model: 8 query and 2 key heads of 16, hidden
32, MLP 48, vocabulary 200. Every tensor holds its element numbers, so the kept ones name their places.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch

from megatron_rlvr.rollout import platform

platform.install()

from sglang.srt.layers import vocab_parallel_embedding  # noqa: E402
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
    qkv = QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, GROUPS, bias=False, tp_rank=rank, tp_size=tp)
    start = 0
    for part, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
        qkv.weight_loader(qkv.weight, numbered(rows * HEAD_DIM, HIDDEN), part)
        length = max(1, rows // tp) * HEAD_DIM
        slices[part] = kept(qkv.weight[start : start + length])
        start += length
    gate_up = MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False, tp_rank=rank, tp_size=tp)
    for index, part in enumerate(("gate", "up")):
        gate_up.weight_loader(gate_up.weight, numbered(FFN, HIDDEN), index)
        slices[part] = kept(gate_up.weight[index * FFN // tp : (index + 1) * FFN // tp])
    down = RowParallelLinear(FFN, HIDDEN, bias=False, tp_rank=rank, tp_size=tp)
    down.weight_loader(down.weight, numbered(HIDDEN, FFN))
    slices["down"] = kept(down.weight)
    # The embedding asks the running server for its rank; there is none here.
    vocab_parallel_embedding.get_parallel = lambda: SimpleNamespace(tp_rank=rank, tp_size=tp)
    embedding = vocab_parallel_embedding.VocabParallelEmbedding(VOCAB, HIDDEN)
    embedding.weight_loader(embedding.weight, numbered(VOCAB, HIDDEN))
    slices["embedding"] = kept(embedding.weight[: embedding.shard_indices.num_org_elements])
    return slices


if __name__ == "__main__":
    result = {str(tp): [rank_slices(tp, rank) for rank in range(tp)] for tp in json.loads(sys.argv[1])}
    print(json.dumps(result))
