"""What the papers prove about baselines, checked on the estimators themselves.

Only the surrogate update of the proposition is tested: for the exact expected policy gradient no baseline changes the
entropy to first order.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.ops import group_advantages
from megatron_rlvr.ops.exact import quantile_rank
from megatron_rlvr.ops.reference.group_advantages import quantile_baseline

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())


def advantages(rewards, **options):
    return group_advantages(rewards, [len(rewards)], **options).numpy()


def surrogate_entropy_change(pi, rewards, baseline):
    """dH/d(eta) of dz = eta pi (r - b): -Cov_pi(log pi, pi (r - b))."""
    step = pi * (rewards - baseline)
    return -float((pi * np.log(pi) * step).sum() - (pi * np.log(pi)).sum() * (pi * step).sum())


@pytest.mark.parametrize("case", VECTORS["A8_prop42"], ids=lambda c: f"V{len(c['logits'])}")
def test_quantile_baselines_are_extreme(case):
    pi, rewards = np.array(case["pi"]), np.array(case["reward"])
    changes = {row["b"]: surrogate_entropy_change(pi, rewards, row["b"]) for row in case["table"]}
    for row in case["table"]:
        assert math.isclose(changes[row["b"]], row["dH_per_eta_first_order"], rel_tol=1e-9, abs_tol=1e-12)
    assert min(changes, key=changes.get) == 0.0
    assert max(changes, key=changes.get) == 1.0
    for bound, change in ((case["bound_b0"], changes[0.0]), (case["bound_b1"], changes[1.0])):
        assert bound[0] <= change <= bound[1]


def mixed_share(size, success):
    """Probability that a group is neither all right nor all wrong; the others carry no step."""
    return 1.0 - success**size - (1.0 - success) ** size


def coefficient(size, success, **options):
    """c of E[mean_i A_i grad log pi(o_i)] = c (pi+ - pi-), summed over all group outcomes."""
    total = 0.0
    for num_right in range(size + 1):
        weight = math.comb(size, num_right) * success**num_right * (1 - success) ** (size - num_right)
        ours = advantages([1.0] * num_right + [0.0] * (size - num_right), **options)
        right, wrong = ours[:num_right].sum() / size, ours[num_right:].sum() / size
        total += weight * (right * (1 - success) - wrong * success)
    return total


@pytest.mark.parametrize("case", VECTORS["A9_expected_direction_coefficient"], ids=lambda c: f"G{c['G']}-p{c['p']}")
def test_baselines_change_only_the_size_of_the_expected_step(case):
    for name, expected in case.items():
        if not name.startswith("c_"):
            continue
        options = {"estimator": "grpo"} if name == "c_mean" else {"K": name.removeprefix("c_")}
        ours = coefficient(case["G"], case["p"], eps=0.0, **options) / mixed_share(case["G"], case["p"])
        assert math.isclose(ours, expected, rel_tol=1e-9)


def test_expected_step_by_brute_force():
    case = VECTORS["A10_direction_bruteforce"]
    rewards = np.array(case["reward"])
    pi = np.exp(case["logits"]) / np.exp(case["logits"]).sum()
    direction = np.array(case["pi_plus_minus_pi_minus"])
    for name, expected in case["coefficient"].items():
        options = {"estimator": "grpo"} if name == "mean" else {"K": name}
        step = np.zeros(len(pi))
        for group in itertools.product(range(len(pi)), repeat=case["G"]):
            chosen = list(group)
            scores = np.eye(len(pi))[chosen] - pi
            step += pi[chosen].prod() * (advantages(rewards[chosen], eps=0.0, **options)[:, None] * scores).mean(axis=0)
        np.testing.assert_allclose(step, step[0] * direction, atol=1e-12)
        assert math.isclose(step[0] / mixed_share(case["G"], float(pi @ rewards)), expected, rel_tol=1e-9)


rewards_of_a_group = st.lists(st.integers(-3, 3).map(lambda n: n / 2), min_size=2, max_size=24)
levels = st.integers(1, 99).map(lambda percent: f"{percent / 100:.2f}")


@settings(max_examples=150, deadline=None)
@given(rewards_of_a_group, levels)
def test_baseline_is_the_generalised_inverse(rewards, level):
    """The smallest x with F(x) >= K, by its definition."""
    ordered = sorted(set(rewards))
    size = len(rewards)
    expected = next(x for x in ordered if Fraction(sum(r <= x for r in rewards), size) >= Fraction(level))
    assert quantile_baseline(np.array(rewards), Fraction(level), "inf") == expected
    assert 1 <= quantile_rank(Fraction(level), size) <= size


@settings(max_examples=150, deadline=None)
@given(rewards_of_a_group, levels, st.randoms(use_true_random=False))
def test_order_and_shift_of_rewards_do_not_matter(rewards, level, random):
    order = list(range(len(rewards)))
    random.shuffle(order)
    for options in ({"K": level}, {"estimator": "grpo"}, {"estimator": "rloo"}):
        ours = advantages(rewards, **options)
        shuffled = advantages(np.array(rewards)[order], **options)
        np.testing.assert_allclose(shuffled, ours[order], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(advantages(np.array(rewards) + 4.0, **options), ours, rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(rewards_of_a_group)
def test_rloo_subtracts_the_mean_of_the_others(rewards):
    rewards = np.array(rewards)
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    np.testing.assert_allclose(advantages(rewards, estimator="rloo"), rewards - others, atol=1e-12)
