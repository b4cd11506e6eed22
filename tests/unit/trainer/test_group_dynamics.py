"""P1, P2 and Prop 4.2 from rollout groups alone."""

import math
from fractions import Fraction

import numpy as np

from megatron_rlvr.entropy.dynamics import entropy_safety, group_covariance, log_softmax
from megatron_rlvr.metrics import values
from megatron_rlvr.trainer.diagnostics.group_dynamics import group_dynamics, safety_metrics
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup


def made_group(index, source, right, seed):
    """One response a verdict, random log-probs; None stands for an aborted response."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for number, verdict in enumerate(right):
        length = int(rng.integers(1, 5))
        rollouts.append(
            Rollout(
                response_ids=np.full(length, number, np.int32),
                rollout_logprobs=-rng.exponential(size=length).astype(np.float32),
                text="",
                finish_reason=FinishReason.abort if verdict is None else FinishReason.stop,
                weight_versions=[(0, 0, length)],
                correctness=float(verdict or 0),
            )
        )
    prompt = Prompt(uid=f"train/{index}", text="", input_ids=np.array([1]), answer="", data_source=source)
    return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)


GROUPS = [
    made_group(0, "sums", [1, 0, 0, 0], 0),
    made_group(1, "sums", [1, 1, 1, 0], 1),
    made_group(2, "words", [1, 0, None, 1], 2),
    made_group(3, "words", [0, 0, 0, 0], 3),
    made_group(4, "words", [1, None, None, None], 4),
]
ADVANTAGES = [
    np.array([1.5, 0.0, 0.0, 0.0]),
    np.array([0.0, 0.0, 0.0, -1.5]),
    np.array([0.0, -1.2, 0.0, 0.0]),
    np.zeros(4),
    np.zeros(4),
]


def test_group_covariance_is_averaged_over_groups():
    found = values(group_dynamics(GROUPS, ADVANTAGES))
    of_group = []
    for group, advantage_G in zip(GROUPS[:4], ADVANTAGES, strict=False):
        kept = [i for i, rollout in enumerate(group.rollouts) if rollout.valid]
        means = [float(np.mean(group.rollouts[i].rollout_logprobs.astype(float))) for i in kept]
        of_group.append(group_covariance(means, advantage_G[kept]))
    weighted = [-each.with_weighted_advantage for each in of_group]
    # The last group has one valid response and no covariance.
    assert math.isclose(found["dynamics/p2"], np.mean(weighted))
    assert math.isclose(found["dynamics/p2_natural"], -np.mean([each.with_advantage for each in of_group]))
    assert math.isclose(found["dynamics/p2/source/sums"], np.mean(weighted[:2]))
    assert math.isclose(found["dynamics/p2/source/words"], np.mean(weighted[2:]))
    assert math.isclose(found["dynamics/p2/accuracy_0_25"], weighted[0])
    assert math.isclose(found["dynamics/p2/accuracy_50_75"], np.mean(weighted[1:3]))
    assert "dynamics/p2/accuracy_75_100" not in found, "groups that are all right or all wrong are in no bucket"


def test_token_covariance_inside_a_source():
    found = values(group_dynamics(GROUPS, ADVANTAGES))
    logprobs, advantages = [], []
    for group, advantage_G in zip(GROUPS[:2], ADVANTAGES, strict=False):
        for rollout, advantage in zip(group.rollouts, advantage_G, strict=True):
            logprobs += rollout.rollout_logprobs.tolist()
            advantages += [advantage] * len(rollout.response_ids)
    assert math.isclose(found["dynamics/p1/source/sums"], -np.cov(logprobs, advantages, bias=True)[0, 1])


def test_safety_of_the_groups_own_policy():
    level = Fraction("0.4")
    found = values(safety_metrics(GROUPS, {"sums": level, "words": level}))
    expected = []
    for group in GROUPS[:3]:
        rollouts = [rollout for rollout in group.rollouts if rollout.valid]
        logprobs = log_softmax([float(np.mean(r.rollout_logprobs.astype(float))) for r in rollouts])
        expected.append(entropy_safety(logprobs, [r.correctness for r in rollouts], 0.4))
    assert found["safety/holds"] == 1.0
    for name in ("change", "opposite_change", "lower", "upper"):
        assert math.isclose(found[f"safety/{name}"], np.mean([getattr(each, name) for each in expected]))
    # Counted: one right of four is hard at K = 0.4; three of four and two of three are easy.
    agrees = [(each.baseline == 0) == hard for each, hard in zip(expected, (True, False, False), strict=True)]
    assert math.isclose(found["safety/regime_agrees"], np.mean(agrees))


def test_a_response_sampled_twice_is_one_action():
    twice = made_group(0, "sums", [1, 0, 0, 0], 0)
    twice.rollouts[2] = twice.rollouts[1]
    once = made_group(0, "sums", [1, 0, 0, 0], 0)
    del once.rollouts[2]
    levels = {"sums": Fraction(1, 2)}
    assert values(safety_metrics([twice], levels)) == values(safety_metrics([once], levels))
