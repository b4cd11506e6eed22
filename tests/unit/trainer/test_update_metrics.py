"""Mismatch and entropy of an update by their definitions, from all responses and from a sample of the elided ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rlvr.data.packing import PackedSequence, build_microbatch
from megatron_rlvr.metrics import merge, values
from megatron_rlvr.policy.policy import LogprobPass
from megatron_rlvr.trainer.update.batch import ProbeScale, UpdateBatch
from megatron_rlvr.trainer.update.metrics import pass_metrics, sampled_entropy_metrics, saving_metrics

LENGTHS = [3, 1, 4, 2, 5, 2]


def sequences():
    rng = np.random.default_rng(0)
    return [
        PackedSequence(
            prompt_ids=np.zeros(2, np.int32),
            response_ids=np.zeros(length, np.int32),
            advantage=float(number % 3 - 1),
            weight=0.1,
            rollout_logprobs=-rng.exponential(size=length).astype(np.float32),
            trajectory=number,
            source="ab"[number % 2],
        )
        for number, length in enumerate(LENGTHS)
    ]


def pass_over(micro):
    """A trainer whose log-probs differ from the engine's, and any entropies."""
    generator = torch.Generator().manual_seed(micro.num_tokens)
    difference = 0.3 * torch.randn(micro.num_tokens, generator=generator)
    entropy = torch.rand(micro.num_tokens, generator=generator) * 2
    return LogprobPass(logprobs=[micro.rollout_logprobs_T + difference], entropy=[entropy]), difference, entropy


def by_response(values_T, micro):
    mask = micro.loss_mask_T
    return [values_T[mask & (micro.trajectory_T == t)].double().numpy() for t in range(len(LENGTHS))]


def test_definitions():
    micro = build_microbatch(sequences(), pad_to_multiple=8)
    once, difference, entropy = pass_over(micro)
    found = values(pass_metrics([micro], once))
    logratios = by_response(difference, micro)
    flat = np.concatenate(logratios)
    ratio, of_response = np.exp(flat), np.exp([d.sum() for d in logratios])
    entropies = by_response(entropy, micro)
    expected = {
        "rollout/logprob_diff_mean": np.abs(flat).mean(),
        "rollout/logprob_diff_max": np.abs(flat).max(),
        "mismatch/kl_k1": -flat.mean(),
        "mismatch/kl_k3": (ratio - 1 - flat).mean(),
        "mismatch/ratio_mean": ratio.mean(),
        "mismatch/ratio_max": ratio.max(),
        "mismatch/ratio_min": ratio.min(),
        "mismatch/ess_token": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
        "mismatch/ess_response": of_response.sum() ** 2 / (len(of_response) * (of_response**2).sum()),
        "mismatch/ppl_ratio": np.mean([np.exp(-d.mean()) for d in logratios]),
        "entropy/mean": np.concatenate(entropies).mean(),
        "entropy/sequence_mean": np.mean([e.mean() for e in entropies]),
        "entropy/positive_advantage": np.concatenate(entropies[2::3]).mean(),
        "entropy/negative_advantage": np.concatenate(entropies[0::3]).mean(),
        "entropy/mean/a": np.concatenate(entropies[0::2]).mean(),
        "entropy/mean/b": np.concatenate(entropies[1::2]).mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_parts_merge_to_the_whole():
    everything = sequences()
    whole = build_microbatch(everything)
    once, _, _ = pass_over(whole)
    parts = []
    for start in range(0, 6, 2):
        part = build_microbatch(everything[start : start + 2])
        inside = (whole.trajectory_T >= start) & (whole.trajectory_T < start + 2)
        of_part = LogprobPass(logprobs=[once.logprobs[0][inside]], entropy=[once.entropy[0][inside]])
        parts.append(pass_metrics([part], of_part))
    merged, expected = values(merge(parts)), values(pass_metrics([whole], once))
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert merged[name] == pytest.approx(value, rel=1e-6), name


def test_a_sample_stands_for_its_stratum():
    """Kept responses at full weight, one probed response for three elided ones of seven tokens in all."""
    kept, probed = build_microbatch(sequences()[:3]), build_microbatch([replace(sequences()[3], advantage=0.0)])
    first, second = pass_over(kept)[0], pass_over(probed)[0]
    scale = ProbeScale(tokens=7 / 2, responses=3.0)
    found = values(merge([pass_metrics([kept], first), pass_metrics([probed], second, scale)]))
    of_kept = first.entropy[0][kept.loss_mask_T].double().numpy()
    of_probed = second.entropy[0][probed.loss_mask_T].double().numpy()
    assert found["entropy/mean"] == pytest.approx((of_kept.sum() + of_probed.mean() * 7) / (8 + 7), rel=1e-6)
    means = [of_kept[:3].mean(), of_kept[3:4].mean(), of_kept[4:].mean()]
    assert found["entropy/sequence_mean"] == pytest.approx((sum(means) + 3 * of_probed.mean()) / 6, rel=1e-6)


def test_without_tokens_entropy_is_unknown_and_not_absent():
    empty = build_microbatch([])
    found = values(pass_metrics([empty], pass_over(empty)[0]))
    assert np.isnan(found["entropy/mean"])
    assert np.isnan(found["rollout/logprob_diff_mean"])


def test_what_was_saved_and_what_the_engine_says_for_nothing():
    kept, probed, idle = (build_microbatch([s]) for s in sequences()[:3])
    update = UpdateBatch(micro_batches=[kept], probed=[probed], idle=[idle], probe_scale=ProbeScale())
    assert values(saving_metrics([update])) == {
        "update/elided_fraction": 9 / 14,
        "update/tokens_saved": 9.0,
        "update/tokens_probed": 3.0,
        "update/prompt_tokens_shared": 0.0,
    }
    engine = np.concatenate([s.rollout_logprobs for s in sequences()[:3]])
    found = values(sampled_entropy_metrics([kept, probed, idle]))
    assert found["entropy/sampled_mean"] == pytest.approx(-engine.mean(), rel=1e-6)
