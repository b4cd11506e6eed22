"""Packed attention against attention sequence by sequence, with and without prompts that responses share."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_rlvr.policy.layers import AttentionPlan, attend

HEADS, GROUPS, SIZE = 4, 2, 8


def by_plan(plan, query_THC, key_THC, value_THC, *, expand):
    outputs = []
    for block in plan.blocks:
        count, queries, keys = block.shape
        q, k, v = (
            x.index_select(0, slots).view(count, length, *x.shape[1:]).transpose(1, 2)
            for x, slots, length in (
                (query_THC, block.query, queries),
                (key_THC, block.key, keys),
                (value_THC, block.key, keys),
            )
        )
        outputs.append(attend(q, k, v, block.visible, scale=None, expand=expand).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.destination_T)


def one_by_one(lengths, prefixes, query_THC, key_THC, value_THC):
    borders = np.concatenate([[0], np.cumsum(lengths)])
    outputs = []
    for segment, prefix in enumerate(prefixes):
        own = range(borders[segment], borders[segment + 1])
        before = range(borders[prefix], borders[prefix + 1]) if prefix >= 0 else range(0)
        tokens = torch.tensor([*before, *own])
        q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query_THC, key_THC, value_THC))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1)[len(before) :])
    return torch.cat(outputs)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_layout_of_segments(seed, expand):
    rng = np.random.default_rng(seed)
    lengths, prefixes = [], []
    for _ in range(int(rng.integers(1, 6))):
        lengths.append(int(rng.integers(1, 12)))
        prefixes.append(-1)
        shared = len(lengths) - 1
        for _ in range(int(rng.integers(0, 5))):
            lengths.append(int(rng.integers(1, 30)))
            prefixes.append(shared)
    total = sum(lengths)
    inputs = [
        torch.from_numpy(rng.normal(size=(total, heads, SIZE))).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)
    ]
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    plan = AttentionPlan.build(borders, prefixes)
    weights = torch.from_numpy(rng.normal(size=(total, HEADS, SIZE)))
    results = []
    for out in (by_plan(plan, *inputs, expand=expand), one_by_one(lengths, prefixes, *inputs)):
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_padding_stays_bounded():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, size=100).tolist()
    prefixes = [-1] * 20 + rng.integers(0, 20, size=80).tolist()
    plan = AttentionPlan.build(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), prefixes)
    queries = sum(block.shape[0] * block.shape[1] for block in plan.blocks)
    keys = sum(block.shape[0] * block.shape[2] for block in plan.blocks)
    whole = sum(lengths) + sum(lengths[prefix] for prefix in prefixes if prefix >= 0)
    assert sum(lengths) <= queries <= sum(lengths) / 0.75
    assert whole <= keys <= whole / 0.75
