"""Lemma 1, Theorems 1 and 2, the per-token coefficient, group covariance and Prop 4.2 with its bounds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.entropy.dynamics import (
    attribute,
    entropy_change,
    entropy_gradient,
    entropy_safety,
    group_covariance,
    log_softmax,
    natural_gradient_change,
    policy_gradient_change,
    sampled_token_bound,
    second_moment,
    surrogate_change,
    token_coefficient_bound,
    token_coefficients,
)

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "entropy_vectors.json").read_text())
logits_lists = st.lists(st.floats(-8, 8), min_size=2, max_size=12)


def entropy_of(logits):
    logp = log_softmax(logits)
    return -float(np.exp(logp) @ logp)


def coefficients_of(logprobs):
    entropy = -float(np.exp(logprobs) @ logprobs)
    return token_coefficients(logprobs, entropy, second_moment(logprobs))


@pytest.mark.parametrize("case", VECTORS["C1_entropy_dynamics"], ids=lambda c: f"V{len(c['pi'])}")
def test_lemma_theorems_and_coefficients(case):
    logp = log_softmax(case["logits"])
    np.testing.assert_allclose(np.exp(logp), case["pi"], rtol=1e-12)
    np.testing.assert_allclose(entropy_gradient(logp), case["dH_dz"], rtol=1e-12, atol=1e-15)
    assert math.isclose(entropy_change(logp, case["dz"]), case["lemma1_dH"], rel_tol=1e-12)
    centred, literal = (policy_gradient_change(logp, case["A"], centred=c) for c in (True, False))
    assert math.isclose(centred, case["thm1_dH_per_eta_centred_A"], rel_tol=1e-12)
    assert math.isclose(literal, case["thm1_literal_uncentred"], rel_tol=1e-12)
    assert math.isclose(natural_gradient_change(logp, case["A"]), case["thm2_dH_per_eta"], rel_tol=1e-12)
    assert math.isclose(second_moment(logp), case["S2"], rel_tol=1e-12)
    np.testing.assert_allclose(coefficients_of(logp), case["per_token_coefficient_s"], rtol=1e-12)
    assert math.isclose(token_coefficient_bound(case["H"]), case["per_token_bound_1/e+H"], rel_tol=1e-12)


@settings(max_examples=100, deadline=None)
@given(logits_lists, st.integers(0, 1000))
def test_lemma_1_by_finite_differences(logits, seed):
    step = np.random.default_rng(seed).normal(size=len(logits))
    h = 1e-5
    measured = (entropy_of(np.array(logits) + h * step) - entropy_of(np.array(logits) - h * step)) / (2 * h)
    assert math.isclose(entropy_change(log_softmax(logits), step), measured, rel_tol=1e-5, abs_tol=1e-8)


@settings(max_examples=100, deadline=None)
@given(logits_lists, st.integers(0, 1000))
def test_coefficients_are_unbiased_bounded_and_give_theorem_1(logits, seed):
    logp = log_softmax(logits)
    pi, s = np.exp(logp), coefficients_of(logp)
    advantages = np.random.default_rng(seed).normal(size=len(logits))
    assert abs(pi @ s) < 1e-12
    assert math.isclose(pi @ (advantages * s), policy_gradient_change(logp, advantages), rel_tol=1e-9, abs_tol=1e-12)
    assert (np.abs(s) <= token_coefficient_bound(entropy_of(logits))).all()
    for token, coefficient in enumerate(s):
        assert math.isclose(entropy_change(logp, np.eye(len(pi))[token] - pi), coefficient, rel_tol=1e-9, abs_tol=1e-12)


def test_actions_of_probability_zero_take_part_in_nothing():
    whole = log_softmax([0.3, -1.0, 0.7])
    masked = log_softmax([0.3, -math.inf, -1.0, 0.7])
    kept = [0, 2, 3]
    assert entropy_gradient(masked)[1] == 0.0
    np.testing.assert_allclose(entropy_gradient(masked)[kept], entropy_gradient(whole), rtol=1e-14)
    change = entropy_change(masked, [0.1, 5.0, 0.2, -0.4])
    assert math.isclose(change, entropy_change(whole, [0.1, 0.2, -0.4]), rel_tol=1e-13)
    assert token_coefficients(-math.inf, 1.0, 0.2) == 0.2


def test_policy_must_be_normalised():
    with pytest.raises(ValueError, match="normalised"):
        entropy_change([-1.0, -1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="logit_change_V"):
        entropy_change(log_softmax([0.0, 1.0]), [0.0, 1.0, 2.0])


def test_largest_advantage_of_a_group_is_within_the_token_bound():
    for size in (2, 4, 8, 16):
        rewards = np.eye(size)[0]
        largest = ((rewards - rewards.mean()) / rewards.std(ddof=1)).max()
        assert largest <= math.sqrt(size)
        assert 1 / rewards.std(ddof=1) <= math.sqrt(size) * (1 + 1e-12)
        assert math.isclose(sampled_token_bound(0.5, size), math.sqrt(size) * (1 / math.e + 0.5), rel_tol=1e-15)


def test_group_covariance():
    case = VECTORS["C2_group_cov"]
    found = group_covariance(case["mean_logp_per_response"], case["A"])
    assert math.isclose(found.with_weighted_advantage, case["cov_logp_vs_piA_with_pi_exp_mean_logp"], rel_tol=1e-12)
    assert math.isclose(found.with_advantage, case["cov_logp_vs_A"], rel_tol=1e-12)


def test_attribution_splits_add_up():
    rng = np.random.default_rng(3)
    A, s, w = rng.integers(-1, 2, 50) * 1.5, rng.normal(size=50), rng.uniform(0, 1.3, 50)
    labels = rng.choice(["hard", "easy", "mixed"], 50).tolist()
    found = attribute(A, s, w, labels)
    assert math.isclose(found.total, float(np.mean(w * A * s)), rel_tol=1e-12)
    assert math.isclose(found.positive + found.negative, found.total, rel_tol=1e-12)
    assert math.isclose(sum(found.by_label.values()), found.total, rel_tol=1e-12)
    hard = np.array(labels) == "hard"
    assert math.isclose(found.by_label["hard"], float((w * A * s)[hard].sum() / 50), rel_tol=1e-12)
    with pytest.raises(ValueError, match=r"\[T\]"):
        attribute(A, s[:-1], w)


@pytest.mark.parametrize("case", VECTORS["A8_prop42"], ids=lambda c: f"V{len(c['logits'])}")
def test_prop_42(case):
    logp = log_softmax(case["logits"])
    for row in case["table"]:
        found = surrogate_change(logp, case["reward"], row["b"])
        assert math.isclose(found, row["dH_per_eta_first_order"], rel_tol=1e-12, abs_tol=1e-15)
        exact = policy_gradient_change(logp, np.array(case["reward"]) - row["b"])
        assert math.isclose(exact, case["dH_per_eta_exact_expected_PG_any_b"], rel_tol=1e-12, abs_tol=1e-15)
    for baseline, level in ((0, 1e-9), (1, 1 - 1e-9)):
        safety = entropy_safety(logp, case["reward"], level)
        assert safety.baseline == baseline
        np.testing.assert_allclose((safety.lower, safety.upper), case[f"bound_b{baseline}"], rtol=1e-12)
        assert safety.holds


@settings(max_examples=200, deadline=None)
@given(logits_lists, st.integers(0, 2**12 - 1), st.sampled_from([0.2, 0.4, 0.6, 0.8]))
def test_quantile_baseline_is_extreme_and_within_the_bounds(logits, bits, level):
    rewards = [float(bits >> i & 1) for i in range(len(logits))]
    logp = log_softmax(logits)
    safety = entropy_safety(logp, rewards, level)
    assert safety.holds
    others = [surrogate_change(logp, rewards, b) for b in np.linspace(0, 1, 11)]
    extreme = min(others) if safety.baseline == 0 else max(others)
    assert math.isclose(safety.change, extreme, rel_tol=1e-9, abs_tol=1e-12)


def test_prop_42_is_for_binary_rewards():
    with pytest.raises(ValueError, match="0 or 1"):
        entropy_safety(log_softmax([0.0, 1.0]), [0.0, -1.0], 0.4)
