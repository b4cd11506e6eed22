"""Losses by name, the loss section's checks, and the reference KL."""

import dataclasses
import math
import sys

import pytest
import torch

from megatron_rlvr.config.schema import (
    CispoConfig,
    ClipCovConfig,
    CovLogp,
    CovScope,
    GspoConfig,
    KlCovConfig,
    KlKind,
    LossConfig,
    MismatchConfig,
    RatioLevel,
)
from megatron_rlvr.loss import LOSSES, LossTokens, reference_kl, validate_loss
from megatron_rlvr.ops import policy_loss


def tokens(selected=None, importance=None):
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(50, generator=generator)
    return LossTokens(
        logprobs_T=logprobs.requires_grad_(),
        old_logprobs_T=logprobs.detach() + 0.5 * torch.randn(50, generator=generator),
        advantages_T=torch.randn(50, generator=generator),
        mask_T=torch.rand(50, generator=generator) < 0.8,
        weights_T=torch.rand(50, generator=generator),
        trajectory_T=torch.arange(50) // 5,
        importance_T=importance,
        selected_T=selected,
    )


CHOSEN = torch.arange(50) % 3 == 0
SECTIONS = [
    (
        LossConfig(eps_low=0.1, eps_high=0.3, dual_clip=1.5, logratio_clamp=0.9),
        {"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.5, "logratio_clamp": 0.9},
    ),
    (LossConfig(name="clip_cov", clip_cov=ClipCovConfig(eps_low=0.3, eps_high=0.4)), {"eps_low": 0.3, "eps_high": 0.4}),
    (
        LossConfig(name="kl_cov", kl_cov=KlCovConfig(beta=0.7, kl=KlKind.k3), logratio_clamp=0.8),
        {"beta": 0.7, "kl": "k3", "logratio_clamp": 0.8},
    ),
    (
        LossConfig(name="gspo", gspo=GspoConfig(eps_low=0.02, eps_high=0.03), dual_clip=1.2),
        {"eps_low": 0.02, "eps_high": 0.03, "dual_clip": 1.2},
    ),
    (LossConfig(name="cispo", cispo=CispoConfig(eps_low=0.5, eps_high=0.1)), {"eps_low": 0.5, "eps_high": 0.1}),
]


@pytest.mark.parametrize(("config", "options"), SECTIONS, ids=lambda x: x.name if isinstance(x, LossConfig) else "")
def test_the_section_reaches_the_op(config, options):
    given = tokens(CHOSEN if config.name in ("clip_cov", "kl_cov") else None, importance=torch.rand(50))
    expected_T, _ = policy_loss(
        given.logprobs_T,
        given.old_logprobs_T,
        given.advantages_T,
        given.mask_T,
        loss=config.name,
        selected_T=given.selected_T,
        trajectory_T=given.trajectory_T if config.name == "gspo" else None,
        **options,
    )
    ours, _ = LOSSES.get(config.name)(given, config)
    # `aggregate` is what a loss of one's own uses, the fused op what the built-in ones do.
    torch.testing.assert_close(ours, given.aggregate(expected_T), rtol=1e-6, atol=1e-7)
    plain, _ = LOSSES.get(config.name)(given, LossConfig(name=config.name))
    assert not torch.equal(ours, plain)


def test_every_loss_is_registered():
    assert sorted(LOSSES) == ["cispo", "clip_cov", "gspo", "kl_cov", "ppo"]
    for name in LOSSES:
        assert validate_loss(LossConfig(name=name), updates_per_rollout=4) == []


def test_kl_cov_on_policy_warns():
    (warning,) = validate_loss(LossConfig(name="kl_cov"), updates_per_rollout=1)
    assert "kl_cov does nothing with train.updates_per_rollout=1" in warning
    (warning,) = validate_loss(LossConfig(name="kl_cov", kl_cov=KlCovConfig(beta=0.0)), updates_per_rollout=2)
    assert "loss.kl_cov.beta=0" in warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nope"}, "loss.name must be one of .*'nope'"),
        ({"aggregation": "mean"}, "loss.aggregation must be one of .*'mean'"),
        ({"eps_low": 1.2}, r"loss.eps_low must be in \[0, 1\], got 1.2"),
        ({"eps_high": -1.0}, "loss.eps_high must be 0 or above, got -1.0"),
        ({"dual_clip": 0.5}, "loss.dual_clip must be above 1, got 0.5"),
        ({"logratio_clamp": 0.0}, "loss.logratio_clamp must be above 0, got 0.0"),
        ({"kl_coef": -0.1}, "loss.kl_coef must be 0 or above, got -0.1"),
        ({"kl_kind": KlKind.k2}, "loss.kl_kind has no effect with loss.kl_coef=0, got 'k2'"),
        ({"clip_cov": ClipCovConfig(ratio="2e-3")}, "loss.clip_cov.ratio has no effect with loss.name=ppo, got '2e-3'"),
        ({"kl_cov": KlCovConfig(beta=2.0)}, "loss.kl_cov.beta has no effect with loss.name=ppo, got 2.0"),
        ({"cov_scope": CovScope.micro}, "loss.cov_scope has no effect with loss.name=ppo, got 'micro'"),
        ({"cov_logp": CovLogp.current}, "loss.cov_logp has no effect with loss.name=ppo, got 'current'"),
        ({"gspo": GspoConfig(eps_low=1e-3)}, "loss.gspo.eps_low has no effect with loss.name=ppo, got 0.001"),
        ({"name": "gspo", "cispo": CispoConfig(eps_high=1.0)}, "loss.cispo.eps_high has no effect .*=gspo, got 1.0"),
        ({"name": "gspo", "eps_high": 0.3}, "loss.eps_high has no effect with loss.name=gspo, got 0.3"),
        ({"name": "cispo", "dual_clip": 3.0}, "loss.dual_clip has no effect with loss.name=cispo, got 3.0"),
        ({"name": "cispo", "cispo": CispoConfig(eps_low=2.0)}, r"loss.cispo.eps_low must be in \[0, 1\], got 2.0"),
        ({"cov_mass": 0.5}, "loss.cov_mass has no effect with loss.name=ppo, got 0.5"),
        ({"name": "kl_cov", "cov_mass": 1.5}, r"loss.cov_mass must be in \(0, 1\], got 1.5"),
        ({"mismatch": MismatchConfig(cap=3.0)}, "loss.mismatch.cap has no effect with loss.mismatch.weight=none"),
        ({"mismatch": MismatchConfig(upper=3.0)}, "loss.mismatch.upper has no effect with loss.mismatch.reject=none"),
        ({"mismatch": MismatchConfig(weight=RatioLevel.token, cap=0.5)}, "loss.mismatch.cap must be 1 or above"),
        ({"mismatch": MismatchConfig(weight=RatioLevel.token, cap=None)}, "loss.mismatch.cap must be a number"),
        ({"mismatch": MismatchConfig(reject=RatioLevel.token, lower=1.5)}, "lower and upper must enclose 1"),
        ({"name": "kl_cov", "dual_clip": 3.0}, "loss.dual_clip has no effect with loss.name=kl_cov, got 3.0"),
        ({"name": "kl_cov", "eps_high": 0.3}, "loss.eps_high has no effect with loss.name=kl_cov, got 0.3"),
        ({"name": "clip_cov", "eps_low": 0.3}, "loss.eps_low has no effect with loss.name=clip_cov, got 0.3"),
        ({"name": "clip_cov", "kl_cov": KlCovConfig(kl=KlKind.k1)}, "loss.kl_cov.kl has no effect .* got 'k1'"),
        ({"name": "clip_cov", "clip_cov": ClipCovConfig(ratio="2")}, r"loss.clip_cov.ratio must be in \(0, 1\]"),
        ({"name": "clip_cov", "clip_cov": ClipCovConfig(lower=6.0)}, "loss.clip_cov.lower must be below"),
        ({"name": "kl_cov", "kl_cov": KlCovConfig(beta=-1.0)}, "loss.kl_cov.beta must be 0 or above, got -1.0"),
    ],
)
def test_bad_sections_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        validate_loss(dataclasses.replace(LossConfig(), **options), updates_per_rollout=2)


def test_a_plugin_reads_what_it_likes(monkeypatch):
    module = type(sys)("loss_plugin")
    module.loss = lambda *args, **kwargs: None
    monkeypatch.setitem(sys.modules, "loss_plugin", module)
    config = LossConfig(name="loss_plugin:loss", dual_clip=2.0, kl_cov=KlCovConfig(beta=3.0))
    assert validate_loss(config, updates_per_rollout=1) == []


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        (KlKind.k1, lambda d: -d, lambda d: 1.0),
        (KlKind.k2, lambda d: d * d / 2, lambda d: -d),
        (KlKind.k3, lambda d: math.exp(d) - 1 - d, lambda d: 1 - math.exp(d)),
        (KlKind.abs, abs, lambda d: math.copysign(1.0, -d)),
    ],
    ids=lambda x: x.value if isinstance(x, KlKind) else "",
)
def test_reference_kl(kind, value, slope):
    logprobs = torch.tensor([-1.0, -2.0, -0.5, torch.nan], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -0.7, -0.6, torch.nan], dtype=torch.float64)
    mask = torch.tensor([True, True, True, False])
    kl = reference_kl(logprobs, ref, mask, kind=kind)
    torch.testing.assert_close(reference_kl(logprobs, ref, mask, kind=kind.value), kl, rtol=0, atol=0)
    kl.sum().backward()
    differences = (ref - logprobs).tolist()[:3]
    torch.testing.assert_close(kl.tolist(), [*(value(d) for d in differences), 0.0])
    torch.testing.assert_close(logprobs.grad.tolist(), [*(slope(d) for d in differences), 0.0])


def test_reference_kl_estimates_the_divergence_of_the_policy_from_the_reference():
    """Expectations under pi of k1 and k3 are KL(pi || ref), summed exactly over a small vocabulary."""
    generator = torch.Generator().manual_seed(0)
    log_pi, log_ref = (torch.log_softmax(torch.randn(7, dtype=torch.float64, generator=generator), 0) for _ in "ab")
    exact = float((log_pi.exp() * (log_pi - log_ref)).sum())
    everything = torch.ones(7, dtype=torch.bool)
    for kind in (KlKind.k1, KlKind.k3):
        estimate = float((log_pi.exp() * reference_kl(log_pi, log_ref, everything, kind=kind)).sum())
        assert math.isclose(estimate, exact, rel_tol=1e-12)
