"""From rollout groups to advantages and metrics; checks of the advantage section."""

import dataclasses
import math
import sys
from fractions import Fraction

import numpy as np
import pytest

from megatron_rlvr.advantage import ESTIMATORS, compute_advantages, validate_advantage
from megatron_rlvr.config.schema import AdvantageConfig, GateOn, QaeMask, Quantile, Std
from megatron_rlvr.metrics import values
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

WITH_BASELINE = ["qae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gpg", "opo"]
BUILT_IN = [*WITH_BASELINE, "psr", "nsr", "w_reinforce"]


def group_of(rewards, *, penalties=None, lengths=None, aborted=(), index=0):
    prompt = Prompt(uid=f"train/{index}", text="", input_ids=np.zeros(1, np.int32), answer=None, data_source="t")
    rollouts = []
    for place, reward in enumerate(rewards):
        length = lengths[place] if lengths else 3
        rollouts.append(
            Rollout(
                response_ids=np.zeros(length, np.int32),
                rollout_logprobs=np.zeros(length, np.float32),
                text="",
                finish_reason=FinishReason.abort if place in aborted else FinishReason.stop,
                weight_versions=[(0, 0, length)],
                correctness=float(reward >= 1),
                reward=float(reward),
                penalty=penalties[place] if penalties else 0.0,
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


def test_qae_and_its_regimes():
    groups = [group_of([1, 0, 0, 0, 0, 0, 0, 0]), group_of([1] * 6 + [0] * 2), group_of([0] * 8), group_of([1] * 8)]
    advantages, metrics = compute_advantages(groups, AdvantageConfig())
    spread = np.std([1] + [0] * 7, ddof=1) + 1e-6
    np.testing.assert_allclose(advantages[0], [1 / spread] + [0] * 7, rtol=1e-14)
    spread = np.std([1] * 6 + [0] * 2, ddof=1) + 1e-6
    np.testing.assert_allclose(advantages[1], [0] * 6 + [-1 / spread] * 2, rtol=1e-14)
    assert not advantages[2].any()
    assert not advantages[3].any()
    plain = values(metrics)
    assert plain["advantage/zero_fraction"] == 29 / 32
    assert plain["advantage/hard_fraction"] == plain["advantage/easy_fraction"] == 0.25
    assert plain["advantage/degenerate_fraction"] == 0.5
    assert plain["advantage/max_abs"] == max(advantages[0].max(), -advantages[1].min())


def test_boundary_belongs_to_hard():
    _, metrics = compute_advantages([group_of([1] + [0] * 9)], AdvantageConfig(K="0.9"))
    assert values(metrics)["advantage/hard_fraction"] == 1.0


@pytest.mark.parametrize("estimator", BUILT_IN)
def test_aborted_responses_count_nowhere(estimator):
    config = AdvantageConfig(estimator=estimator)
    with_aborted = [group_of([1, 7, 0, 0], aborted=(1,)), group_of([1, 1, 0])]
    without = [group_of([1, 0, 0]), group_of([1, 1, 0])]
    ours, metrics = compute_advantages(with_aborted, config)
    expected, expected_metrics = compute_advantages(without, config)
    np.testing.assert_array_equal(ours[0], [expected[0][0], 0.0, *expected[0][1:]])
    np.testing.assert_array_equal(ours[1], expected[1])
    assert values(metrics) == values(expected_metrics)


@pytest.mark.parametrize("estimator", WITH_BASELINE)
def test_equal_rewards_are_exactly_zero(estimator):
    advantages, metrics = compute_advantages(
        [group_of([0.3] * 8), group_of([0.3] * 8)], AdvantageConfig(estimator=estimator)
    )
    assert not np.concatenate(advantages).any()
    assert values(metrics)["advantage/zero_fraction"] == 1.0


def test_overlong_penalty_is_half_on_the_unit_scale():
    """DAPO's +-1 score plus penalty gives the same GRPO advantages as 0/1 plus half of it."""
    rewards, penalties = [1, 0, 0, 1], [0.0, -0.5, 0.0, -1.0]
    ours, _ = compute_advantages([group_of(rewards, penalties=penalties)], AdvantageConfig(estimator="dr_grpo"))
    dapo = 2 * np.array(rewards) - 1 + np.array(penalties)
    np.testing.assert_allclose(2 * ours[0], dapo - dapo.mean(), rtol=1e-14)
    parity, _ = compute_advantages(
        [group_of(rewards, penalties=penalties)], AdvantageConfig(gate_on=GateOn.reward, std=Std.none)
    )
    np.testing.assert_allclose(parity[0], np.array([1, -0.25, 0, 0.5]) - -0.0, rtol=1e-14)


def test_qae_adds_the_penalty_to_the_gated_advantage():
    rewards, penalties = [1, 0, 0, 0], [0.0, -0.5, 0.0, 0.0]
    shaped, _ = compute_advantages([group_of(rewards, penalties=penalties)], AdvantageConfig())
    plain, _ = compute_advantages([group_of(rewards, penalties=penalties)], AdvantageConfig(penalty_additive=False))
    np.testing.assert_allclose(shaped[0] - plain[0], np.array(penalties) / 2 / (0.5 + 1e-6), rtol=1e-12)


def test_reinforce_pp_whitens_over_tokens():
    groups = [group_of([1, 0], lengths=[2, 5]), group_of([0, 0], lengths=[1, 3])]
    advantages, _ = compute_advantages(groups, AdvantageConfig(estimator="reinforce_pp"))
    tokens = np.repeat(np.concatenate(advantages), [2, 5, 1, 3])
    assert math.isclose(tokens.mean(), 0.0, abs_tol=1e-12)
    assert math.isclose(tokens.std(ddof=1), 1.0, rel_tol=1e-6)


def test_options_reach_the_estimator():
    groups = [group_of([1, 1, 0, 0, 0, 0, 0, 0])]
    for config, expected in [
        (AdvantageConfig(K="7/8", std=Std.none), [0, 0] + [-1] * 6),
        (AdvantageConfig(K="1/8", std=Std.none), [1, 1] + [0] * 6),
        (AdvantageConfig(mask=QaeMask.none, std=Std.none), [1, 1] + [-1] * 6),
        (AdvantageConfig(K="0.8", quantile=Quantile.linear, std=Std.none), [0.4, 0.4] + [-0.6] * 6),
    ]:
        np.testing.assert_allclose(compute_advantages(groups, config)[0][0], expected, rtol=1e-12)
    assert compute_advantages([], AdvantageConfig())[0] == []


def test_comparison_estimators_follow_their_formulas():
    """R of two groups; lengths 1..4 in each (spec E4)."""
    rewards = np.array([[1.0, 0, 0, 1], [0, 0, 0, 1]])
    groups = [group_of(list(row), lengths=[1, 2, 3, 4], index=i) for i, row in enumerate(rewards)]
    mean = rewards.mean(axis=1, keepdims=True)
    lengths = np.array([1, 2, 3, 4])
    for estimator, expected in {
        "psr": rewards,
        "nsr": rewards - 1,
        "gpg": (rewards - mean) * 8 / 3,
        "opo": rewards - (lengths * rewards).sum(axis=1, keepdims=True) / 10,
    }.items():
        ours, _ = compute_advantages(groups, AdvantageConfig(estimator=estimator))
        np.testing.assert_allclose(ours, expected, rtol=1e-14, err_msg=estimator)
    weighted, _ = compute_advantages(groups, AdvantageConfig(estimator="w_reinforce", positive_weight=0.3))
    np.testing.assert_allclose(weighted, np.where(rewards == 1, 0.3, -1))


def test_levels_of_groups_are_those_of_separate_computations():
    groups = [
        group_of([1, 0, 0, 0, 1], index=0),
        group_of([1, 1, 0, 1], index=1),
        group_of([0, 1, 1, 0, 1, 1], index=2),
    ]
    levels = [Fraction(1, 5), Fraction(9, 10), Fraction(1, 2)]
    together, metrics = compute_advantages(groups, AdvantageConfig(), levels=levels)
    regimes = {"advantage/hard_fraction": 0.0, "advantage/easy_fraction": 0.0}
    for group, level, ours in zip(groups, levels, together, strict=True):
        [alone], alone_metrics = compute_advantages([group], AdvantageConfig(K=str(level)))
        np.testing.assert_array_equal(ours, alone)
        for name in regimes:
            regimes[name] += values(alone_metrics)[name] / 3
    assert regimes == {name: pytest.approx(values(metrics)[name]) for name in regimes}
    with pytest.raises(ValueError, match="K must have one level, or one for each of the 3 groups, got 2"):
        compute_advantages(groups, AdvantageConfig(), levels=levels[:2])


def test_an_estimator_from_a_plugin(monkeypatch):
    module = type(sys)("estimator_plugin")
    module.double = lambda scored, config: 2 * scored.rewards_N
    module.wrong = lambda scored, config: scored.rewards_N[1:]
    monkeypatch.setitem(sys.modules, "estimator_plugin", module)
    config = AdvantageConfig(estimator="estimator_plugin:double", K="0.7")
    validate_advantage(config)
    advantages, _ = compute_advantages([group_of([1, 0.5])], config)
    np.testing.assert_array_equal(advantages[0], [2.0, 1.0])
    with pytest.raises(ValueError, match=r"'estimator_plugin:wrong' must return 2 finite numbers, got shape \[1\]"):
        compute_advantages([group_of([1, 0.5])], AdvantageConfig(estimator="estimator_plugin:wrong"))


def test_every_estimator_is_registered():
    assert sorted(ESTIMATORS) == sorted(BUILT_IN)
    for name in BUILT_IN:
        validate_advantage(AdvantageConfig(estimator=name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "nope"}, "advantage.estimator must be one of .*'nope'"),
        ({"estimator": "grpo", "K": "0.5"}, "advantage.K has no effect with advantage.estimator=grpo, got '0.5'"),
        ({"estimator": "grpo", "std": Std.none}, "advantage.std must be sample or population with grpo"),
        ({"estimator": "grpo", "gate_on": GateOn.reward}, "advantage.gate_on has no effect .*=grpo, got 'reward'"),
        ({"estimator": "rloo", "eps": 1e-4}, "advantage.eps has no effect with advantage.estimator=rloo"),
        ({"estimator": "dr_grpo", "std": Std.population}, "advantage.std has no effect .*=dr_grpo, got 'population'"),
        ({"estimator": "reinforce_pp", "mask": QaeMask.none}, "advantage.mask has no effect"),
        ({"estimator": "psr", "K_dither": True}, "advantage.K_dither has no effect with advantage.estimator=psr"),
        ({"positive_weight": 0.2}, "advantage.positive_weight has no effect with advantage.estimator=qae, got 0.2"),
        ({"estimator": "w_reinforce", "positive_weight": -1.0}, "advantage.positive_weight must be 0 or above"),
        ({"K": "1.0"}, r"advantage.K must be in \(0, 1\), got '1.0'"),
        ({"K": "many"}, "advantage.K must be a number .* got 'many'"),
        ({"eps": -1.0}, "advantage.eps must be 0 or above, got -1.0"),
        ({"gate_on": GateOn.reward, "penalty_additive": False}, "advantage.penalty_additive has no effect"),
        ({"gate_on": GateOn.reward, "mask": QaeMask.none}, "advantage.mask must be qae with advantage.gate_on=reward"),
        ({"quantile": Quantile.linear, "mask": QaeMask.none}, "advantage.mask must be qae with advantage.quantile"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        validate_advantage(dataclasses.replace(AdvantageConfig(), **options))
