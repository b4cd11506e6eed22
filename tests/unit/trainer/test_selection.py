"""Choosing tokens in the trainer: sized by share of the covariance, with elided responses, without zero advantages."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rlvr.config.schema import ClipCovConfig, KlCovConfig, LossConfig
from megatron_rlvr.data.packing import PackedSequence, build_microbatch
from megatron_rlvr.trainer.update.selection import TokenSelector


def micro_of(advantages, *, first=0, scale=1.0, seed=0):
    """Responses of six tokens, log-probs drawn by response."""
    sequences, logprobs = [], []
    for number, advantage in enumerate(advantages):
        rng = np.random.default_rng((seed, first + number))
        logprobs.append(-rng.exponential(size=6).astype(np.float32))
        sequences.append(
            PackedSequence(
                prompt_ids=np.zeros(2, np.int32),
                response_ids=np.zeros(6, np.int32),
                advantage=advantage * scale,
                weight=1.0,
                rollout_logprobs=logprobs[-1],
                trajectory=first + number,
            )
        )
    micro = build_microbatch(sequences)
    return replace(micro, old_logprobs_T=micro.rollout_logprobs_T)


ADVANTAGES = [2.0, -1.0, 0.0, 0.0, 1.5, -0.5, 0.0, -2.0]


def choose(loss, micro_batches, elided=()):
    chosen = TokenSelector(loss, seed=3, group=None).choose(micro_batches, elided=elided, step=1, everywhere=False)
    return torch.cat(chosen)


def kl_cov(ratio="0.25", *, mass=None, skip=False):
    return LossConfig(name="kl_cov", cov_mass=mass, kl_cov=KlCovConfig(ratio=ratio, skip_zero_advantage=skip))


def covariance_of(micro):
    mask = micro.loss_mask_T
    logprobs, advantages = micro.old_logprobs_T[mask].double(), micro.advantages_T[mask].double()
    cov = torch.zeros(len(mask), dtype=torch.float64)
    cov[mask] = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    return cov


def test_a_share_of_the_mass_is_held_by_as_few_tokens_as_can():
    micro = micro_of(ADVANTAGES)
    cov = covariance_of(micro)
    ordered = cov[cov > 0].sort(descending=True).values
    for mass in (0.1, 0.5, 0.9):
        chosen = choose(kl_cov("1", mass=mass), [micro])
        count = int(chosen.sum())
        assert float(ordered[:count].sum()) >= mass * float(ordered.sum()) > float(ordered[: count - 1].sum())
        assert float(cov[chosen].min()) >= float(cov[~chosen].max())


def test_the_share_is_free_of_scale_rises_with_rho_and_is_capped():
    counts = [int(choose(kl_cov("1", mass=m), [micro_of(ADVANTAGES)]).sum()) for m in (0.05, 0.2, 0.5, 0.8, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    for scale in (0.25, 8.0):
        scaled = micro_of(ADVANTAGES, scale=scale)
        assert torch.equal(
            choose(kl_cov("1", mass=0.5), [scaled]), choose(kl_cov("1", mass=0.5), [micro_of(ADVANTAGES)])
        )
    micro = micro_of(ADVANTAGES)
    assert torch.equal(choose(kl_cov("0.1", mass=1.0), [micro]), choose(kl_cov("0.1"), [micro]))
    nothing = micro_of([0.0] * 4)
    assert not choose(kl_cov(mass=0.5), [nothing]).any(), "no positive covariance, nothing to choose"
    clip = LossConfig(name="clip_cov", cov_mass=0.5, clip_cov=ClipCovConfig(ratio="1", lower=0.0, upper=1e9))
    assert 0 < int(choose(clip, [micro]).sum()) == int(choose(kl_cov("1", mass=0.5), [micro]).sum())


@pytest.mark.parametrize("loss", [kl_cov(), kl_cov("1", mass=0.5), kl_cov(skip=True)], ids=["ratio", "mass", "skip"])
def test_elided_responses_count_and_splits_do_not_matter(loss):
    whole = micro_of(ADVANTAGES)
    parts = [micro_of(ADVANTAGES[:3]), micro_of(ADVANTAGES[3:], first=3)]
    assert torch.equal(choose(loss, [whole]), choose(loss, parts))
    kept = [micro_of([a], first=i) for i, a in enumerate(ADVANTAGES) if a != 0]
    elided = [micro_of([a], first=i) for i, a in enumerate(ADVANTAGES) if a == 0]
    of_kept = torch.cat([torch.full((8,), a != 0) for a in ADVANTAGES])
    assert torch.equal(choose(loss, kept, elided), choose(loss, [whole])[of_kept])


def test_zero_advantages_are_skipped_where_asked():
    """They count in N: the same number of tokens is chosen among the others."""
    micro = micro_of(ADVANTAGES)
    zero = micro.loss_mask_T & (micro.advantages_T == 0)
    plain, skipping = choose(kl_cov("0.6"), [micro]), choose(kl_cov("0.6", skip=True), [micro])
    assert (plain & zero).any()
    assert not (skipping & zero).any()
    assert int(plain.sum()) == int(skipping.sum()) == int(0.6 * 48)


def test_relative_bounds_are_free_of_scale():
    """Bounds of 0.5 and 3 means of the positive covariances, whatever the advantages are multiplied with."""
    section = ClipCovConfig(ratio="1", lower=0.5, upper=3.0, relative_bounds=True)
    micro = micro_of(ADVANTAGES)
    cov = covariance_of(micro)
    unit = float(cov[cov > 0].mean())
    chosen = choose(LossConfig(name="clip_cov", clip_cov=section), [micro])
    assert torch.equal(chosen, (cov > 0.5 * unit) & (cov < 3.0 * unit))
    assert 0 < int(chosen.sum()) < int((cov > 0).sum())
    scaled = micro_of(ADVANTAGES, scale=1 / 64)
    assert torch.equal(chosen, choose(LossConfig(name="clip_cov", clip_cov=section), [scaled]))
    absolute = LossConfig(name="clip_cov", clip_cov=replace(section, relative_bounds=False))
    assert not torch.equal(chosen, choose(absolute, [scaled]))
    assert not choose(LossConfig(name="clip_cov", clip_cov=section), [micro_of([1.0] * 4)]).any()
