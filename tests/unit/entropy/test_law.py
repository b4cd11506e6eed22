"""The law R = -a exp(H) + b: vectors, recovery from made data, the monitor's event and its state."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.entropy.f_distribution import f_survival, regularised_beta
from megatron_rlvr.entropy.law import LawMonitor, active_interventions, fit_law, predict_early

CASE = json.loads((Path(__file__).parents[2] / "data" / "entropy_vectors.json").read_text())["C3_law_fit"]


def assert_matches(fit, expected):
    assert math.isclose(fit.a, expected["a"], rel_tol=1e-12)
    assert math.isclose(fit.b, expected["b"], rel_tol=1e-12)
    assert math.isclose(fit.ceiling, expected["ceiling"], rel_tol=1e-12)
    assert math.isclose(fit.s2, expected["s2"], rel_tol=1e-10)
    assert math.isclose(fit.ceiling_se, expected["se_ceiling"], rel_tol=1e-10)
    assert math.isclose(fit.r2, expected["r2"], rel_tol=1e-12)


def test_fit_of_all_points():
    fit = fit_law(CASE["H_nats"], CASE["R_noisy"])
    assert_matches(fit, CASE["fit_all"])
    # Least squares as numpy does it, with its covariance of the coefficients scaled by s2.
    (slope, offset), spread = np.polyfit(np.exp(CASE["H_nats"]), CASE["R_noisy"], 1, cov=True)
    assert math.isclose(-slope, fit.a, rel_tol=1e-9)
    assert math.isclose(offset, fit.b, rel_tol=1e-9)
    np.testing.assert_allclose([fit.a_se, fit.b_se], np.sqrt(np.diag(spread)), rtol=1e-9)
    assert fit.valid
    assert fit.p_value < 1e-12


def test_fit_recovers_the_coefficients_of_clean_data():
    fit = fit_law(CASE["H_nats"], CASE["R_clean"])
    assert math.isclose(fit.a, CASE["a_true"], rel_tol=1e-10)
    assert math.isclose(fit.ceiling, CASE["ceiling_true"], rel_tol=1e-10)


def test_early_prediction():
    early = predict_early(CASE["H_nats"], CASE["R_noisy"], share=7 / 16)
    assert_matches(early.fit, CASE["fit_first_7"])
    np.testing.assert_allclose(early.predicted, CASE["predicted_late"], rtol=1e-12)
    assert math.isclose(early.rmse, CASE["rmse_late"], rel_tol=1e-10)
    assert math.isclose(early.final_error, CASE["R_noisy"][-1] - CASE["predicted_late"][-1], rel_tol=1e-9)


def test_early_share_is_not_rounded_up_by_the_last_bit():
    H = np.linspace(1.0, 0.1, 60)
    assert predict_early(H, 0.5 - 0.1 * np.exp(H), share=0.15).fit.num_points == 9


def test_weights_count_points_and_only_their_ratio_matters():
    H, R = np.array(CASE["H_nats"]), np.array(CASE["R_noisy"])
    w = np.arange(1, 17)
    weighted, repeated = fit_law(H, R, weights=w), fit_law(np.repeat(H, w), np.repeat(R, w))
    assert math.isclose(weighted.a, repeated.a, rel_tol=1e-12)
    assert math.isclose(weighted.ceiling, repeated.ceiling, rel_tol=1e-12)
    scaled = fit_law(H, R, weights=w * 37.0)
    assert math.isclose(weighted.ceiling_se, scaled.ceiling_se, rel_tol=1e-12)
    assert math.isclose(weighted.s2, scaled.s2, rel_tol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.2), st.floats(0.65, 0.9), st.integers(0, 10_000))
def test_true_coefficients_lie_within_their_errors(a, b, seed):
    rng = np.random.default_rng(seed)
    H = np.linspace(1.1, 0.05, 60)
    R = np.clip(b - a * np.exp(H) + rng.normal(0, 0.005, 60), 0, 1)
    fit = fit_law(H, R)
    assert abs(fit.ceiling - (b - a)) < 6 * fit.ceiling_se


def test_fit_says_why_it_is_not_valid():
    H = np.array([0.50, 0.52, 0.54, 0.56])
    narrow = fit_law(H, 0.5 - 0.1 * np.exp(H))
    assert not narrow.valid
    assert "spans" in narrow.reason
    acting = fit_law(CASE["H_nats"], CASE["R_noisy"], interventions=("qae", "kl_cov"))
    assert not acting.valid
    assert "qae, kl_cov" in acting.reason
    assert math.isclose(acting.a, CASE["fit_all"]["a"], rel_tol=1e-12)


def test_constant_accuracy_explains_nothing():
    fit = fit_law([1.0, 0.5, 0.1], [0.25, 0.25, 0.25])
    assert (fit.a, fit.r2, fit.f_statistic, fit.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("entropy", "accuracy", "weights", "word"),
    [
        ([1.0, 0.5], [0.1, 0.2], None, "3 points"),
        ([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], None, "differ"),
        ([1.0, 0.5, -0.1], [0.1, 0.2, 0.3], None, "-0.1"),
        ([1.0, 0.5, 0.1], [10.0, 20.0, 30.0], None, "fraction"),
        ([1.0, 0.5, 0.1], [0.1, math.nan, 0.3], None, "nan"),
        ([1.0, 0.5, 0.1], [0.1, 0.2], None, "one value a point"),
        ([1.0, 0.5, 0.1], [0.1, 0.2, 0.3], [1, 0, 1], "weights"),
    ],
)
def test_bad_points_are_refused(entropy, accuracy, weights, word):
    with pytest.raises(ValueError, match=word):
        fit_law(entropy, accuracy, weights=weights)


def test_interventions_of_a_run():
    assert (
        active_interventions(estimator="grpo", policy_loss="ppo", entropy_coef=0.0, kl_coef=0.0, controlled=False) == ()
    )
    found = active_interventions(estimator="qae", policy_loss="kl_cov", entropy_coef=0.01, kl_coef=0.1, controlled=True)
    assert found == ("qae", "kl_cov", "entropy bonus", "reference KL", "entropy controller")


@pytest.mark.parametrize(
    ("statistic", "dof_2", "expected"),
    # Two-sided Student quantiles squared, from tables: t(10; .975), t(1; .975), t(30; .995).
    [(2.228138852**2, 10, 0.05), (12.70620474**2, 1, 0.05), (2.749995654**2, 30, 0.01)],
)
def test_f_tail(statistic, dof_2, expected):
    assert math.isclose(f_survival(statistic, 1, dof_2), expected, rel_tol=1e-8)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(1, 40), st.integers(1, 40))
def test_incomplete_beta_is_the_binomial_tail(x, p, q):
    """I_x(p, q) = P(Binomial(p + q - 1, x) >= p) for integers (DLMF 8.17.5)."""
    n = p + q - 1
    tail = math.fsum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(p, n + 1))
    assert math.isclose(regularised_beta(x, p, q), tail, rel_tol=1e-10, abs_tol=1e-14)


def plain_run(monitor, count=12, seed=0):
    rng = np.random.default_rng(seed)
    for i, entropy in enumerate(np.linspace(1.1, 0.3, count)):
        accuracy = 0.56 - 0.17 * math.exp(entropy) + rng.normal(0, 0.002)
        report = monitor.add(i + 1, float(entropy), float(accuracy), 256)
    return report


def test_monitor_follows_the_law():
    monitor = LawMonitor()
    report = plain_run(monitor)
    assert not report.above_ceiling
    assert not report.broken
    assert abs(report.fit.ceiling - 0.39) < 3 * report.fit.ceiling_se
    assert report.one_step_rmse < 0.02
    before = fit_law(*zip(*[(h, r) for _, h, r, _ in monitor.points[:-1]], strict=True))
    _, entropy, accuracy, _ = monitor.points[-1]
    assert math.isclose(report.one_step_error, accuracy - float(before.predict(entropy)), rel_tol=1e-9)


def test_monitor_reports_a_broken_law_once():
    monitor = LawMonitor(patience=3)
    plain_run(monitor)
    events = [monitor.add(20 + i, 0.3, 0.48 + 0.01 * i, 256).broken for i in range(5)]
    assert events == [False, False, True, False, False]


def test_one_high_point_does_not_break_the_law():
    monitor = LawMonitor(patience=2)
    plain_run(monitor)
    reports = [monitor.add(20 + i, 0.3, r, 256) for i, r in enumerate([0.48, 0.33, 0.48, 0.33])]
    assert reports[0].above_ceiling
    assert not reports[1].above_ceiling
    assert not any(r.broken for r in reports)


def test_monitor_holds_a_run_against_a_plain_one():
    plain = fit_law(CASE["H_nats"], CASE["R_noisy"])
    monitor = LawMonitor(interventions=("qae",), reference=plain, patience=1)
    report = monitor.add(1, 0.8, plain.ceiling + 4 * plain.ceiling_se, 64)
    assert report.broken
    assert report.fit is None


def test_monitor_without_a_spread_of_entropy_has_no_ceiling():
    monitor = LawMonitor(patience=1)
    for i in range(8):
        assert not monitor.add(i, 0.5 + 0.001 * i, 0.1 + 0.1 * i, 256).above_ceiling


def test_monitor_resumes_in_the_middle_of_a_stretch():
    whole, first = LawMonitor(patience=3), LawMonitor(patience=3)
    for monitor in (whole, first):
        plain_run(monitor)
        monitor.add(20, 0.3, 0.48, 256)
    second = LawMonitor(patience=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in (21, 22, 23):
        assert second.add(step, 0.3, 0.49, 256) == whole.add(step, 0.3, 0.49, 256)


def test_monitor_refuses_steps_out_of_order():
    monitor = LawMonitor()
    monitor.add(4, 0.5, 0.2, 10)
    with pytest.raises(ValueError, match="above 4"):
        monitor.add(4, 0.5, 0.2, 10)
