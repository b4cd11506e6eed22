"""Every estimator x loss x aggregation x controller x elision composes, or is refused with its reason (spec G12)."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rlvr.advantage import ESTIMATORS, compute_advantages, validate_advantage
from megatron_rlvr.config.schema import (
    ActuatorConfig,
    ActuatorName,
    AdvantageConfig,
    ControllerConfig,
    CovLogp,
    CovScope,
    Elision,
    GateOn,
    KCourse,
    KlCovConfig,
    KPoint,
    KScheduleConfig,
    LossConfig,
    MismatchConfig,
    OverlongConfig,
    QaeMask,
    Quantile,
    RatioLevel,
    RewardConfig,
    RunConfig,
    SourceLevel,
    TrainConfig,
)
from megatron_rlvr.loss import LOSSES, LossTokens, token_weights, validate_loss
from megatron_rlvr.loss.aggregation import AGGREGATIONS
from megatron_rlvr.loss.mismatch import importance
from megatron_rlvr.trainer.checks.composition import check_composition
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

ADVANTAGES = [
    *[AdvantageConfig(estimator=name) for name in ESTIMATORS],
    *[AdvantageConfig(mask=mask) for mask in (QaeMask.pos_mask, QaeMask.neg_mask)],
]
COVARIANCE = ("clip_cov", "kl_cov")


def actuator(name):
    low, high = {"entropy_coef": (0.0, 0.01), "K": (0.2, 0.8), "eps_high": (0.0, 2.0)}.get(name, (1e-4, 0.1))
    return ActuatorConfig(name=ActuatorName[name], low=low, high=high, gain=0.01, max_step=0.01)


CONTROLLERS = [ControllerConfig()] + [
    ControllerConfig(target_entropy=0.5, actuators=[actuator(name.value)]) for name in ActuatorName
]


def check(config):
    validate_advantage(config.advantage)
    validate_loss(config.loss, config.train.updates_per_rollout)
    check_composition(config)


def expected_refusal(advantage, loss, controller, elision):
    """Words of the reason, or None."""
    for entry in controller.actuators:
        name = entry.name.value
        if name == "K" and advantage.estimator != "qae":
            return f"must not hold K: advantage.estimator={advantage.estimator} has no K"
        if name in COVARIANCE and loss.name != name:
            return f"must not hold {name}: it moves loss.{name}.ratio, which has no effect with loss.name={loss.name}"
        if name == "eps_high" and loss.name == "kl_cov":
            return "must not hold eps_high: loss.name=kl_cov has no upper clip"
    if elision is Elision.always:
        if loss.name == "kl_cov":
            return "got 'always': KL-Cov's penalty falls on tokens of zero advantage too"
        if any(entry.name is ActuatorName.entropy_coef for entry in controller.actuators):
            return "got 'always': the controller may turn on the entropy bonus"
    return None


def test_the_whole_product():
    composed, refused = 0, 0
    for advantage, name, aggregation, controller, elision in itertools.product(
        ADVANTAGES, LOSSES, AGGREGATIONS, CONTROLLERS, Elision
    ):
        loss = LossConfig(name=name, aggregation=aggregation)
        train = TrainConfig(updates_per_rollout=2, elide_zero_advantage=elision)
        config = RunConfig(experiment_name="x", advantage=advantage, loss=loss, controller=controller, train=train)
        expected = expected_refusal(advantage, loss, controller, elision)
        if expected is None:
            check(config)
            composed += 1
        else:
            with pytest.raises(ValueError, match=re.escape(expected)):
                check(config)
            refused += 1
    assert (composed, refused) == (13 * 5 * len(AGGREGATIONS) * 6 * 3 - refused, refused)
    assert refused > 1000


def group_of(correct, index):
    rng = np.random.default_rng(index)
    rollouts = []
    for right in correct:
        length = int(rng.integers(2, 6))
        rollouts.append(
            Rollout(
                response_ids=np.zeros(length, np.int32),
                rollout_logprobs=-rng.random(length).astype(np.float32),
                text="",
                finish_reason=FinishReason.stop,
                weight_versions=[(0, 0, length)],
                correctness=float(right),
                reward=float(right),
            )
        )
    prompt = Prompt(uid=f"train/{index}", text="", input_ids=np.zeros(1, np.int32), answer="", data_source="t")
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


GROUPS = [group_of(row, i) for i, row in enumerate([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])]


@pytest.mark.parametrize("weight", list(RatioLevel), ids=lambda level: f"weight {level.value}")
def test_every_composition_has_a_finite_loss(weight):
    """And tokens of zero advantage have a gradient of exactly zero, KL-Cov's selected ones excepted."""
    rollouts = [rollout for group in GROUPS for rollout in group.rollouts]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    engine = torch.tensor(np.concatenate([rollout.rollout_logprobs for rollout in rollouts]))
    generator = torch.Generator().manual_seed(0)
    old = engine + 0.1 * torch.randn(len(engine), generator=generator)
    trajectory = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = torch.ones_like(trajectory, dtype=torch.bool)
    mismatch = MismatchConfig(weight=weight, reject=RatioLevel.geometric)
    weights, _ = importance(old, engine, mask, trajectory, mismatch)
    for advantage, name, aggregation in itertools.product(ADVANTAGES, LOSSES, AGGREGATIONS):
        advantages, _ = compute_advantages(GROUPS, advantage)
        per_token = torch.tensor(np.repeat(np.concatenate(advantages), lengths), dtype=torch.float32)
        per_response = token_weights(lengths, aggregation, 8)
        # Moved against the advantages, so that no clip takes all of the gradient away.
        drift = torch.randn(len(old), generator=generator).abs() * torch.where(per_token > 0, -0.1, 0.1)
        logprobs = (old + drift).requires_grad_()
        selected = torch.rand(len(old), generator=generator) < 0.3 if name in COVARIANCE else None
        tokens = LossTokens(
            logprobs_T=logprobs,
            old_logprobs_T=old,
            advantages_T=per_token,
            mask_T=mask,
            weights_T=torch.tensor(np.repeat(per_response, lengths), dtype=torch.float32),
            trajectory_T=trajectory,
            importance_T=weights,
            selected_T=selected,
        )
        loss, _ = LOSSES.get(name)(tokens, LossConfig(name=name, aggregation=aggregation, mismatch=mismatch))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logprobs.grad).all()
        idle = (per_token == 0) if name != "kl_cov" else (per_token == 0) & ~selected
        assert (logprobs.grad[idle] == 0).all(), (advantage.estimator, name)
        if per_token.any():
            assert logprobs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": LossConfig(kl_coef=0.1)}, "got 'always': the KL to the reference model"),
        ({"loss": LossConfig(entropy_coef=0.1)}, "got 'always': the entropy bonus"),
        ({"loss": LossConfig(name="clip_cov", cov_scope=CovScope.micro)}, "got 'always': loss.cov_scope=micro takes"),
        ({"loss": LossConfig(name="mine:loss")}, "got 'always': loss.name=mine:loss is not built in"),
    ],
)
def test_elision_on_demand_is_refused_where_it_is_not_exact(changes, message):
    config = RunConfig(experiment_name="x", train=TrainConfig(elide_zero_advantage=Elision.always))
    with pytest.raises(ValueError, match=message):
        check_composition(replace(config, **changes))
    check_composition(replace(config, train=TrainConfig(), **changes))


def test_documented_substitutions_are_taken_on_demand():
    config = RunConfig(experiment_name="x", train=TrainConfig(elide_zero_advantage=Elision.always))
    for loss in (
        LossConfig(name="clip_cov"),
        LossConfig(name="clip_cov", cov_logp=CovLogp.current),
        LossConfig(name="kl_cov", kl_cov=KlCovConfig(skip_zero_advantage=True)),
    ):
        check_composition(replace(config, loss=loss))


TWO_PHASE = KScheduleConfig(kind=KCourse.two_phase, end="0.2", switch_step=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": AdvantageConfig(K_schedule=KScheduleConfig(end="0.2"))}, "K_schedule.end has no effect with"),
        (
            {"advantage": AdvantageConfig(K_schedule=KScheduleConfig(kind=KCourse.cosine, end="0.2"))},
            "K_schedule.last_step must be given with kind=cosine, got None",
        ),
        (
            {"advantage": AdvantageConfig(K_schedule=replace(TWO_PHASE, end="2"))},
            r"advantage.K_schedule.end: K must be in \(0, 1\), got '2'",
        ),
        (
            {
                "advantage": AdvantageConfig(
                    K="0.3", K_schedule=KScheduleConfig(kind=KCourse.piecewise, points=[KPoint(step=1, K="0.5")])
                )
            },
            "advantage.K has no effect with advantage.K_schedule.kind=piecewise, got '0.3'",
        ),
        (
            {"advantage": AdvantageConfig(K_by_source=[SourceLevel(source="a", K="1")])},
            r"K_by_source of 'a': K must be",
        ),
        (
            {"advantage": AdvantageConfig(K_by_source=[SourceLevel(source="a", K="0.5")] * 2)},
            "K_by_source must name every source once",
        ),
        ({"advantage": AdvantageConfig(gate_memory="1")}, r"advantage.gate_memory must be in \[0, 1\), got '1'"),
        (
            {"advantage": AdvantageConfig(gate_memory="0.5", K_dither=True)},
            "advantage.K_dither has no effect with advantage.gate_memory above 0",
        ),
        (
            {"advantage": AdvantageConfig(K_dither=True, quantile=Quantile.linear)},
            "advantage.K_dither needs advantage.quantile=inf",
        ),
        (
            {"advantage": AdvantageConfig(gate_memory="0.5", gate_on=GateOn.reward)},
            "advantage.gate_memory needs advantage.gate_on=correctness",
        ),
        (
            {
                "advantage": AdvantageConfig(estimator="w_reinforce"),
                "reward": RewardConfig(overlong=OverlongConfig(enabled=True)),
            },
            "reward.overlong.enabled has no effect with advantage.estimator=w_reinforce",
        ),
        ({"controller": ControllerConfig(patience=3)}, "controller.patience has no effect while controller.target_ent"),
        (
            {"controller": ControllerConfig(actuators=[actuator("K")])},
            r"controller.target_entropy must be given \(nats\) with controller.actuators, got null",
        ),
        ({"controller": ControllerConfig(target_entropy=0.5)}, "controller: actuators must hold at least one"),
        (
            {"controller": ControllerConfig(target_entropy=-1.0, actuators=[actuator("K")])},
            "controller: target must be above 0 nats, got -1.0",
        ),
        (
            {"controller": ControllerConfig(target_entropy=0.5, actuators=[actuator("K")] * 2)},
            "controller.actuators must have different names",
        ),
        (
            {"controller": ControllerConfig(target_entropy=0.5, actuators=[replace(actuator("K"), low=0.5)])},
            r"controller.actuators K must have low <= advantage.K = 0.4 <= high, got \[0.5, 0.8\]",
        ),
        (
            {"controller": ControllerConfig(target_entropy=0.5, actuators=[replace(actuator("K"), low=0.0)])},
            r"controller.actuators K must keep advantage.K in \(0, 1\), got \[0, 0.8\]",
        ),
        (
            {
                "controller": ControllerConfig(target_entropy=0.5, actuators=[actuator("K")]),
                "advantage": AdvantageConfig(K_schedule=TWO_PHASE),
            },
            "must not hold K: advantage.K_schedule.kind=two_phase moves K already",
        ),
        (
            {
                "controller": ControllerConfig(target_entropy=0.5, actuators=[actuator("K")]),
                "train": TrainConfig(elided_metrics_share=0.0),
            },
            "train.elided_metrics_share must be above 0 with controller.target_entropy",
        ),
        ({"train": TrainConfig(elided_metrics_share=1.5)}, r"train.elided_metrics_share must be in \[0, 1\], got 1.5"),
        (
            {"train": TrainConfig(elide_zero_advantage=Elision.never, elided_metrics_share=0.5)},
            "train.elided_metrics_share has no effect with train.elide_zero_advantage=never",
        ),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check(replace(RunConfig(experiment_name="x"), **changes))
