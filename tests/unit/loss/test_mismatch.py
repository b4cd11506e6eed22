"""Weights against the trainer-engine mismatch, by their definitions on responses worked out by hand."""

import math

import pytest
import torch

from megatron_rlvr.config.schema import MismatchConfig, RatioLevel
from megatron_rlvr.loss.mismatch import importance
from megatron_rlvr.metrics import merge, values

# Two responses of three and two tokens, two prompt tokens and padding between; log ratios of the masked ones.
LOGRATIO = torch.tensor([9.0, 0.5, -1.0, 0.2, 9.0, 0.4, 1.1, 9.0], dtype=torch.float64)
MASK = torch.tensor([False, True, True, True, False, True, True, False])
TRAJECTORY = torch.tensor([4, 4, 4, 4, 7, 7, 7, -1])
ENGINE = torch.where(MASK, -1.5, torch.nan).double()
TRAINER = torch.where(MASK, ENGINE + LOGRATIO, torch.nan)
SUMS, MEANS = {4: -0.3, 7: 1.5}, {4: -0.1, 7: 0.75}
EXPECTED = {
    RatioLevel.token: LOGRATIO,
    RatioLevel.sequence: torch.tensor([SUMS.get(t, 0.0) for t in TRAJECTORY.tolist()], dtype=torch.float64),
    RatioLevel.geometric: torch.tensor([MEANS.get(t, 0.0) for t in TRAJECTORY.tolist()], dtype=torch.float64),
}


def weights(**settings):
    return importance(TRAINER, ENGINE, MASK, TRAJECTORY, MismatchConfig(**settings))


def expect(ours, masked):
    torch.testing.assert_close(ours[MASK], masked[MASK], rtol=1e-12, atol=0)
    assert (ours[~MASK] == 1).all()


def test_off_is_nothing_at_all():
    assert weights() == (None, {})


@pytest.mark.parametrize("level", list(EXPECTED))
def test_truncated_importance_sampling(level):
    ours, metrics = weights(weight=level, cap=1.3)
    ratio = EXPECTED[level].exp()
    expect(ours, ratio.clamp(max=1.3))
    shares = values(metrics)
    assert shares["mismatch/truncated_fraction"] == float((ratio[MASK] > 1.3).double().mean()) > 0
    assert math.isclose(shares["mismatch/weight_mean"], float(ratio[MASK].clamp(max=1.3).mean()), rel_tol=1e-12)
    assert "mismatch/rejected_fraction" not in shares


@pytest.mark.parametrize("level", list(EXPECTED))
def test_rejection(level):
    ours, metrics = weights(reject=level, lower=0.5, upper=2.0)
    ratio = EXPECTED[level].exp()
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    expect(ours, inside.double())
    assert 0 < values(metrics)["mismatch/rejected_fraction"] == float((~inside[MASK]).double().mean()) < 1


def test_masked_importance_sampling():
    """IcePop: the token's ratio inside the bounds, 0 outside, nothing truncated."""
    ours, _ = weights(weight=RatioLevel.token, cap=None, reject=RatioLevel.token, lower=0.5, upper=2.0)
    ratio = LOGRATIO.exp()
    expect(ours, torch.where((ratio >= 0.5) & (ratio <= 2.0), ratio, 0.0))


def test_responses_are_rejected_whole_while_tokens_are_weighted():
    ours, _ = weights(weight=RatioLevel.token, reject=RatioLevel.geometric, upper=2.0)
    expect(ours, torch.where(TRAJECTORY == 7, 0.0, LOGRATIO.exp().clamp(max=2.0)))


def test_no_mismatch_means_no_correction():
    for level in EXPECTED:
        ours, metrics = importance(
            ENGINE, ENGINE, MASK, TRAJECTORY, MismatchConfig(weight=level, reject=level, lower=1.0, upper=1.0)
        )
        assert (ours == 1).all()
        assert values(metrics)["mismatch/rejected_fraction"] == values(metrics)["mismatch/truncated_fraction"] == 0.0


def test_long_products_stay_finite():
    engine = torch.full((100,), -9.0)
    ours, _ = importance(
        engine + 5, engine, engine < 0, torch.zeros(100, dtype=torch.long), MismatchConfig(weight=RatioLevel.sequence)
    )
    assert (ours == 2.0).all()


def test_no_tokens():
    nothing = torch.zeros_like(MASK)
    for level in EXPECTED:
        ours, metrics = importance(TRAINER, ENGINE, nothing, TRAJECTORY, MismatchConfig(weight=level, reject=level))
        assert (ours == 1).all()
        assert math.isnan(values(merge([metrics]))["mismatch/weight_mean"])
