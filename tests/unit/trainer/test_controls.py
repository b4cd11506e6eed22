"""K and the controller's settings from step to step, and resumed in the middle."""

import json
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import (
    ActuatorConfig,
    ActuatorName,
    AdvantageConfig,
    CispoConfig,
    ClipCovConfig,
    ControllerConfig,
    GspoConfig,
    KCourse,
    KPoint,
    KScheduleConfig,
    LossConfig,
    SourceLevel,
)
from megatron_rlvr.metrics import values
from megatron_rlvr.ops.exact import quantile_rank
from megatron_rlvr.trainer.steering.controls import Controls
from megatron_rlvr.trainer.steering.levels import level_of_rank, verdicts
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

OFF = ControllerConfig()


def group_of(correct, *, index=0, source="sums", uid=None):
    rollouts = [
        Rollout(
            response_ids=np.zeros(2, np.int32),
            rollout_logprobs=np.zeros(2, np.float32),
            text="",
            finish_reason=FinishReason.stop if right is not None else FinishReason.abort,
            weight_versions=[(0, 0, 2)],
            correctness=float(right or 0),
            reward=float(right or 0),
        )
        for right in correct
    ]
    prompt = Prompt(
        uid=uid or f"train/{index}", text="", input_ids=np.zeros(1, np.int32), answer="", data_source=source
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


def controls_of(advantage=None, loss=None, controller=OFF):
    return Controls(advantage or AdvantageConfig(), loss or LossConfig(), controller, seed=5)


@pytest.mark.parametrize(
    ("schedule", "start", "expected"),
    [
        (KScheduleConfig(), "1/3", {1: "1/3", 1000: "1/3"}),
        (
            KScheduleConfig(kind=KCourse.piecewise, points=[KPoint(step=10, K="0.6"), KPoint(step=20, K="0.4")]),
            "0.4",
            {1: "3/5", 10: "3/5", 15: "1/2", 20: "2/5", 99: "2/5"},
        ),
        (
            KScheduleConfig(kind=KCourse.cosine, end="0.4", first_step=1, last_step=101),
            "0.6",
            {1: "3/5", 51: "1/2", 101: "2/5", 26: "0.570711"},
        ),
        (KScheduleConfig(kind=KCourse.two_phase, end="0.4", switch_step=7), "0.6", {6: "3/5", 7: "2/5"}),
    ],
    ids=lambda x: x.kind.value if isinstance(x, KScheduleConfig) else "",
)
def test_schedules(schedule, start, expected):
    controls = controls_of(AdvantageConfig(K=start, K_schedule=schedule))
    for step, level in expected.items():
        assert controls.level(step) == Fraction(level)
        assert controls.levels([group_of([1, 0])], step=step) == [Fraction(level)]
        assert values(controls.metrics(step))["advantage/K"] == float(Fraction(level))


def test_sources_have_levels_of_their_own():
    config = AdvantageConfig(K="0.4", K_by_source=[SourceLevel(source="algebra", K="0.8")])
    groups = [group_of([1, 1, 1, 0, 0], index=0), group_of([1, 1, 1, 0, 0], index=1, source="algebra")]
    controls = controls_of(config)
    levels = controls.levels(groups, step=1)
    assert levels == [Fraction(2, 5), Fraction(4, 5)]
    both, _ = compute_advantages(groups, config, levels=levels)
    [first], _ = compute_advantages(groups[:1], AdvantageConfig(K="0.4"))
    [second], _ = compute_advantages(groups[1:], AdvantageConfig(K="0.8"))
    np.testing.assert_array_equal(both[0], first)
    np.testing.assert_array_equal(both[1], second)
    assert (first > 0).any()
    assert (second < 0).any()
    assert values(controls.metrics(1))["advantage/K/algebra"] == 0.8


def test_a_dithered_rank_has_the_wanted_mean():
    controls = controls_of(AdvantageConfig(K="0.4", K_dither=True))
    groups = [group_of([1, 0, 0, 0, 0, 0, 0, None], index=i) for i in range(4000)]
    ranks = [quantile_rank(level, 7) for level in controls.levels(groups, step=3)]
    assert set(ranks) == {2, 3}
    assert np.mean(ranks) == pytest.approx(2.8, abs=0.03)
    assert ranks == [quantile_rank(level, 7) for level in controls.levels(groups, step=3)]
    assert ranks != [quantile_rank(level, 7) for level in controls.levels(groups, step=4)]


def test_a_level_of_a_rank_has_that_rank():
    for size in range(1, 65):
        for rank in range(1, size + 1):
            level = level_of_rank(rank, size)
            assert 0 < level < 1
            assert quantile_rank(level, size) == rank


def test_a_gate_with_memory_decides_the_regime():
    config = AdvantageConfig(gate_memory="0.5")
    controls = controls_of(config)
    easy = group_of([1, 1, 1, 0], uid="p")
    [plain], _ = compute_advantages([easy], config, levels=controls.levels([easy], step=1))
    assert plain[3] < 0, "first visits are gated on themselves"
    controls.learn([verdicts(group_of([0, 0, 0, 0], uid="p"))])
    [remembered], _ = compute_advantages([easy], config, levels=controls.levels([easy], step=2))
    assert remembered[0] > 0
    assert remembered[3] == 0.0
    solved = group_of([1, 1, 1, 1], uid="p")
    assert not compute_advantages([solved], config, levels=controls.levels([solved], step=2))[0][0].any()


CONTROLLER = ControllerConfig(
    target_entropy=1.0,
    rho=1.0,
    actuators=[
        ActuatorConfig(name=ActuatorName.K, low=0.2, high=0.8, gain=0.1, max_step=0.1),
        ActuatorConfig(name=ActuatorName.entropy_coef, low=0.0, high=0.02, gain=0.01, max_step=0.01),
        ActuatorConfig(name=ActuatorName.eps_high, low=0.2, high=0.38, gain=0.1, max_step=0.1),
    ],
)


def test_the_controller_moves_settings_in_rank():
    controls = controls_of(controller=CONTROLLER)
    seen = []
    for step in range(1, 9):
        loss = controls.loss()
        seen.append((loss.entropy_coef, round(loss.eps_high, 9), float(controls.level(step))))
        controls.observe(np.exp(-1.0))
    assert seen == [
        (0.0, 0.28, 0.4),
        (0.01, 0.28, 0.4),
        (0.02, 0.28, 0.4),
        (0.02, 0.28, 0.4),
        (0.02, 0.38, 0.4),
        (0.02, 0.38, 0.4),
        (0.02, 0.38, 0.5),
        (0.02, 0.38, 0.6),
    ]
    metrics = values(controls.metrics(9))
    assert metrics["controller/active"] == 2
    assert metrics["controller/error"] == pytest.approx(1.0)
    assert metrics["controller/value/K"] == metrics["advantage/K"] == 0.7
    controls.observe(float("nan"))
    assert values(controls.metrics(9)) == metrics, "nothing measured, nothing moved"


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(name="gspo"), LossConfig(name="gspo", gspo=GspoConfig(eps_high=0.25))),
        (LossConfig(name="cispo"), LossConfig(name="cispo", cispo=CispoConfig(eps_high=0.25))),
        (LossConfig(name="clip_cov"), LossConfig(name="clip_cov", clip_cov=ClipCovConfig(eps_high=0.25))),
    ],
    ids=lambda loss: loss.name,
)
def test_the_upper_clip_is_that_of_the_loss(loss, expected):
    entry = ActuatorConfig(name=ActuatorName.eps_high, low=0.0, high=1.0, gain=1.0, max_step=1.0)
    controls = controls_of(loss=loss, controller=replace(CONTROLLER, actuators=[entry]))
    assert controls.loss() == loss
    controls.state = replace(controls.state, actuators=(replace(controls.state.actuators[0], value=0.25),))
    assert controls.loss() == expected


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resumed_in_the_middle(stop):
    """Schedule, dither, gate and controller go on as if there had been no stop."""
    advantage = AdvantageConfig(
        K="0.6",
        K_schedule=KScheduleConfig(kind=KCourse.cosine, end="0.3", last_step=15),
        gate_memory="0.6",
    )
    controller = replace(CONTROLLER, actuators=CONTROLLER.actuators[1:])

    def follow(controls, steps):
        seen = []
        for step in steps:
            rng = np.random.default_rng(step)
            groups = [group_of(rng.integers(0, 2, 6).tolist(), uid=f"p{i}", index=step * 9 + i) for i in range(4)]
            levels = controls.levels(groups, step=step)
            advantages, _ = compute_advantages(groups, advantage, levels=levels)
            seen.append((levels, [a.tolist() for a in advantages], controls.loss(), values(controls.metrics(step))))
            controls.learn([verdicts(group) for group in groups])
            controls.observe(float(rng.random() * 2))
        return seen

    whole = follow(controls_of(advantage, controller=controller), range(1, 21))
    first = controls_of(advantage, controller=controller)
    parts = follow(first, range(1, stop + 1))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    json.dumps(state)
    again = controls_of(advantage, controller=controller)
    again.load_state_dict(state)
    assert parts + follow(again, range(stop + 1, 21)) == whole


def test_a_checkpoint_of_another_controller_is_refused():
    state = controls_of(controller=CONTROLLER).state_dict()
    with pytest.raises(ValueError, match="controller must be on as in the checkpoint, got off"):
        controls_of().load_state_dict(state)
    fewer = replace(CONTROLLER, actuators=CONTROLLER.actuators[:1])
    with pytest.raises(ValueError, match=r"controller.actuators must be the checkpoint's 3, got 1"):
        controls_of(controller=fewer).load_state_dict(state)


def test_other_estimators_have_no_levels():
    controls = controls_of(AdvantageConfig(estimator="grpo"))
    assert controls.levels([group_of([1, 0])], step=1) is None
    assert controls.metrics(1) == {}
