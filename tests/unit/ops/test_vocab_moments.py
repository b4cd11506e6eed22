"""Second moments of the policy: the vectors, and the definitions over splits with masked columns."""

import json
from pathlib import Path

import pytest
import torch

from megatron_rlvr.ops import vocab_parallel_logprob_entropy, vocab_parallel_moments
from megatron_rlvr.ops.vocab_moments import merge_second_moments

pytestmark = pytest.mark.usefixtures("ops_backend")
VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())


@pytest.mark.parametrize("case", VECTORS["D1_logp_entropy"], ids=lambda c: c["case"])
def test_vectors(case):
    logits = torch.tensor([[float(x) for x in case["logits"]]], dtype=torch.float64)
    moments = vocab_parallel_moments(logits, torch.tensor([case["target"]]), temperature=case["T"])
    torch.testing.assert_close(moments.logprobs_T.item(), case["logp"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.entropy_T.item(), case["H"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.sum_p2_T.item(), case["sum_p2"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.sum_p2_logp_T.item(), case["S2"], rtol=1e-11, atol=1e-12)


def test_shards_merge_to_the_whole():
    case = VECTORS["D1_logp_entropy"][0]
    masked = [-torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0]
    shards = [[float(x) for x in shard] for shard in case["shards_7_6"]]
    sum_p2, s2 = merge_second_moments(torch.tensor([*shards, masked], dtype=torch.float64)[:, None])
    torch.testing.assert_close(sum_p2.item(), case["sum_p2"], rtol=1e-12, atol=0)
    torch.testing.assert_close(s2.item(), case["S2"], rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_definitions(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 5000, generator=generator)).to(dtype)
    logits[1, 2500:] = -torch.inf
    targets = torch.randint(2500, (6,), generator=generator)
    moments = vocab_parallel_moments(logits, targets, temperature=0.9)
    log_p = torch.log_softmax(logits.double() / 0.9, dim=1)
    p = log_p.exp()
    safe = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * safe).sum(dim=1)
    torch.testing.assert_close(moments.sum_p2_T, (p**2).sum(dim=1), rtol=1e-6, atol=0)
    expected = (p**2 * (safe + entropy[:, None])).sum(dim=1)
    torch.testing.assert_close(moments.sum_p2_logp_T, expected, rtol=1e-5, atol=1e-8)
    plain = vocab_parallel_logprob_entropy(logits, targets, temperature=0.9)
    torch.testing.assert_close((moments.logprobs_T, moments.entropy_T), plain, rtol=0, atol=1e-6)
