"""Predictions held against measurements over the rows of a run."""

import itertools
import json
import math

import numpy as np
import pytest

from megatron_rlvr.entropy.agreement import agreement
from megatron_rlvr.entropy.dynamics_monitor import DynamicsMonitor


def made_rows(count=8):
    """Entropies that follow P1 up to noise; M1 and P4 on every second step."""
    rng = np.random.default_rng(0)
    rows, entropy = [], 1.0
    for step in range(1, count + 1):
        cov, p4 = float(rng.uniform(0.01, 0.05)), float(-rng.uniform(0.01, 0.02))
        row = {"step": step, "entropy/mean": entropy, "cov/mean": cov}
        row |= {"entropy/mean/sums": entropy + 0.1, "entropy/mean/words": entropy - 0.1}
        if step % 2 == 0:
            row |= {"dynamics/p4": p4, "dynamics/m1": 0.97 * p4}
            row |= {"dynamics/p4/source/sums": 2 * p4, "dynamics/m1/source/sums": 2 * p4}
        rows.append(row)
        entropy += -0.5 * cov + float(rng.normal(0, 1e-3))
    return rows


def test_pairs_are_those_of_the_right_steps():
    rows = made_rows()
    monitor = DynamicsMonitor(window=50)
    found = [monitor.observe(row) for row in rows]
    assert found[0] == {"dynamics/p1": -rows[0]["cov/mean"]}
    change = [after["entropy/mean"] - before["entropy/mean"] for before, after in itertools.pairwise(rows)]
    assert [f["dynamics/m2"] for f in found[1:]] == change
    expected = agreement([-row["cov/mean"] for row in rows[:-1]], change)
    last = found[-1]
    assert last["agreement/p1_m2/num_steps"] == len(rows) - 1
    assert math.isclose(last["agreement/p1_m2/correlation"], expected.correlation)
    assert math.isclose(last["agreement/p1_m2/slope"], expected.slope)
    assert math.isclose(last["agreement/p4_m1/ratio"], 0.97, rel_tol=1e-9)
    assert last["agreement/p4_m1/num_steps"] == 4
    assert math.isclose(last["agreement/p4_m1/ratio/source/sums"], 1.0, rel_tol=1e-9)
    # A prediction of one step meets the entropy of the next one's rollouts.
    assert found[2]["agreement/p4_m2/num_steps"] == 1
    assert "agreement/p4_m2/num_steps" not in found[1]


def test_one_source_is_not_told_twice():
    monitor = DynamicsMonitor(window=50)
    for row in made_rows():
        del row["entropy/mean/words"]
        found = monitor.observe(row)
    assert not any("/source/" in key for key in found)


def test_window_forgets():
    monitor = DynamicsMonitor(window=3)
    for row in made_rows(8):
        found = monitor.observe(row)
    assert found["agreement/p1_m2/num_steps"] == 3


def test_no_change_is_measured_over_a_gap():
    first, *_, last = made_rows(4)
    monitor = DynamicsMonitor(window=3)
    monitor.observe(first)
    assert "dynamics/m2" not in monitor.observe(last)


def test_resumes_at_any_step():
    rows = made_rows()
    whole = DynamicsMonitor(window=5)
    expected = [whole.observe(row) for row in rows]
    for cut in range(1, len(rows)):
        first, second = DynamicsMonitor(window=5), DynamicsMonitor(window=5)
        for row in rows[:cut]:
            first.observe(row)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        got = [second.observe(row) for row in rows[cut:]]
        # NaN of undetermined numbers equals NaN.
        np.testing.assert_equal(got, expected[cut:])


def test_a_value_that_is_not_finite_is_no_value():
    monitor = DynamicsMonitor(window=3)
    monitor.observe({"step": 1, "entropy/mean": 0.5, "cov/mean": math.nan})
    found = monitor.observe({"step": 2, "entropy/mean": 0.4, "cov/mean": 0.1})
    assert found == {"dynamics/p1": -0.1, "dynamics/m2": pytest.approx(-0.1)}
