"""The controllers as pure maps: vectors, saturation, anti-windup, hand-over there and back, resume."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.entropy.controller import (
    Actuator,
    EntropyControllerSettings,
    EntropyControllerState,
    KControllerSettings,
    KControllerState,
    entropy_controller_step,
    initial_state,
    k_controller_step,
    rank_by_authority,
    values_of,
)
from megatron_rlvr.ops.exact import quantile_rank

CASE = json.loads((Path(__file__).parents[2] / "data" / "entropy_vectors.json").read_text())["G1_k_controller"]
PARAMS = CASE["params"]
K_SETTINGS = KControllerSettings(
    target=PARAMS["H_target"],
    rho=PARAMS["rho"],
    gain=PARAMS["gain"],
    deadband=PARAMS["deadband"],
    k_min=PARAMS["K_min"],
    k_max=PARAMS["K_max"],
    max_step=PARAMS["max_step"],
)


def test_k_controller_vectors():
    state = KControllerState(k=PARAMS["K0"])
    for row in CASE["rows"]:
        state = k_controller_step(K_SETTINGS, state, row["H_measured"])
        assert math.isclose(state.ema, row["ema"], rel_tol=1e-12)
        assert math.isclose(state.error, row["log_error"], rel_tol=1e-12)
        assert math.isclose(state.k, row["K_next"], rel_tol=1e-12)
        assert quantile_rank(Fraction(repr(state.k)), 16) == row["m_G16"]
        # The vectors' rank is of K off the grid. On it (spec A2) the float dust over 1/4 at t = 2 does not count.
        assert quantile_rank(state.level, 16) == (4 if row["t"] == 2 else row["m_G16"])
        assert state.saturated == (-1 if row["t"] >= 4 else 0)


def test_k_level_is_on_the_grid():
    state = k_controller_step(K_SETTINGS, KControllerState(k=0.4), 0.27)
    assert (state.level * 10**6).denominator == 1
    assert abs(float(state.level) - state.k) <= 5e-7
    assert KControllerState(k=0.30000000000000004).level == Fraction(3, 10)


def test_k_stays_within_the_deadband():
    state = k_controller_step(K_SETTINGS, KControllerState(k=0.4), 0.3 * math.exp(0.049))
    assert state.k == 0.4
    assert k_controller_step(K_SETTINGS, KControllerState(k=0.4), 0.3 * math.exp(0.051)).k < 0.4


def test_k_leaves_its_bound_as_soon_as_the_error_turns():
    fast = replace(K_SETTINGS, rho=1.0)
    state = KControllerState(k=0.4)
    for _ in range(500):
        state = k_controller_step(fast, state, 3.0)
    assert (state.k, state.saturated) == (0.2, -1)
    state = k_controller_step(fast, state, 0.1)
    assert math.isclose(state.k, 0.2 + 0.05, rel_tol=1e-12)
    assert state.saturated == 0


def test_k_rises_as_far_as_it_may_when_the_entropy_is_gone():
    state = k_controller_step(K_SETTINGS, KControllerState(k=0.4), 0.0)
    assert state.error == math.inf
    assert math.isclose(state.k, 0.45, rel_tol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=40), st.floats(0.2, 0.8))
def test_k_moves_by_little_and_against_the_error(entropies, start):
    state = KControllerState(k=start)
    for entropy in entropies:
        after = k_controller_step(K_SETTINGS, state, entropy)
        assert 0.2 <= after.k <= 0.8
        assert abs(after.k - state.k) <= 0.05 + 1e-12
        assert after.k == state.k or (after.k > state.k) == (after.error > 0)
        state = after


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("target", 0.0, "target"),
        ("rho", 0.0, "rho"),
        ("gain", -0.1, "gain"),
        ("k_min", 0.9, "k_min"),
        ("k_max", 1.0, "k_max"),
        ("max_step", 0.0, "max_step"),
        ("deadband", -1.0, "deadband"),
    ],
)
def test_bad_k_settings_are_refused(field, value, word):
    with pytest.raises(ValueError, match=word):
        replace(K_SETTINGS, **{field: value})


@pytest.mark.parametrize("entropy", [math.nan, -0.1, math.inf])
def test_bad_entropies_are_refused(entropy):
    with pytest.raises(ValueError, match="entropy"):
        k_controller_step(K_SETTINGS, KControllerState(k=0.4), entropy)


BONUS = Actuator(name="entropy_coef", low=0.0, rest=0.0, high=0.02, gain=0.01, max_step=0.01)
KL_COV = Actuator(name="kl_cov", low=0.0, rest=0.0, high=0.2, gain=0.1, max_step=0.1)
K_LAST = Actuator(name="K", low=0.2, rest=0.4, high=0.6, gain=0.1, max_step=0.1)
SETTINGS = EntropyControllerSettings(target=1.0, actuators=(BONUS, KL_COV, K_LAST), rho=1.0)
LOW, HIGH = math.exp(-1.0), math.exp(1.0)
"""Entropies with log error 1 and -1: each step is one `gain`."""


def follow(entropies, state=None, plan=SETTINGS):
    state, rows = state or initial_state(plan), []
    for entropy in entropies:
        state = entropy_controller_step(plan, state, entropy)
        rows.append(tuple(round(v, 9) for v in values_of(plan, state).values()))
    return state, rows


def test_actuators_hand_over_in_rank_when_spent():
    state, rows = follow([LOW] * 11)
    assert rows == [
        (0.01, 0.0, 0.4),
        (0.02, 0.0, 0.4),
        (0.02, 0.0, 0.4),  # stands at its bound for the one step of patience
        (0.02, 0.1, 0.4),
        (0.02, 0.2, 0.4),
        (0.02, 0.2, 0.4),
        (0.02, 0.2, 0.5),
        (0.02, 0.2, 0.6),
        (0.02, 0.2, 0.6),
        (0.02, 0.2, 0.6),
        (0.02, 0.2, 0.6),
    ]
    assert state.saturated == 1
    assert state.active is None


def test_actuators_hand_back_in_reverse_without_winding_up():
    state, _ = follow([LOW] * 500)
    state, rows = follow([HIGH] * 8, state)
    assert rows == [
        (0.02, 0.2, 0.5),
        (0.02, 0.2, 0.4),
        (0.02, 0.1, 0.4),
        (0.02, 0.0, 0.4),
        (0.01, 0.0, 0.4),
        (0.0, 0.0, 0.4),
        # Only now, with the others at rest and at their lower bounds, K goes below its rest.
        (0.0, 0.0, 0.3),
        (0.0, 0.0, 0.2),
    ]
    assert state.saturated == -1


def test_k_below_its_rest_comes_back_before_the_bonus_is_used():
    state, _ = follow([HIGH] * 2)
    _, rows = follow([LOW] * 3, state)
    assert rows == [(0.0, 0.0, 0.3), (0.0, 0.0, 0.4), (0.01, 0.0, 0.4)]


def test_patience_starts_anew_within_the_deadband():
    plan = replace(SETTINGS, patience=3)
    state, _ = follow([LOW] * 4 + [1.0], plan=plan)
    assert state.active is None
    _, rows = follow([LOW] * 4, state, plan=plan)
    assert [row[1] for row in rows] == [0.0, 0.0, 0.0, 0.1]


def test_effect_is_learnt_from_the_steps_own_changes():
    """A made plant in which the entropy answers each change of the bonus by 8 nats a unit."""
    plan = replace(SETTINGS, target=0.6, deadband=0.0)
    state, entropy = initial_state(plan), 0.5
    assert state.actuators[0].effect is None
    for _ in range(5):
        before = state.actuators[0].value
        state = entropy_controller_step(plan, state, entropy)
        entropy += 8.0 * (state.actuators[0].value - before)
    assert math.isclose(state.actuators[0].effect, 8.0, rel_tol=1e-9)
    assert state.actuators[1].effect is None


def test_controller_settles_where_the_plant_obeys():
    """A made first-order plant, H' = H + 0.3 (0.5 + 40 alpha - H); nothing is claimed about a real one."""
    plan = replace(SETTINGS, rho=0.5)
    state, entropy = initial_state(plan), 0.5
    for _ in range(300):
        state = entropy_controller_step(plan, state, entropy)
        entropy += 0.3 * (0.5 + 40 * state.actuators[0].value - entropy)
    assert abs(math.log(state.ema)) < 0.06
    assert abs(state.actuators[0].value - 0.0125) < 0.002


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=60), st.integers(1, 3))
def test_one_actuator_moves_and_never_against_the_need(entropies, patience):
    plan = replace(SETTINGS, rho=0.3, patience=patience)
    state = initial_state(plan)
    for entropy in entropies:
        after = entropy_controller_step(plan, state, entropy)
        changes = [b.value - a.value for a, b in zip(state.actuators, after.actuators, strict=True)]
        assert sum(change != 0 for change in changes) <= 1
        for change, actuator, current in zip(changes, plan.actuators, after.actuators, strict=True):
            assert change == 0 or (change > 0) == (after.error > 0)
            assert abs(change) <= actuator.max_step + 1e-12
            assert actuator.low <= current.value <= actuator.high
        state = after


def test_controller_resumes_from_plain_numbers():
    entropies = [0.4, 0.5, 0.45, 0.9, 1.3, 1.2, 0.7, 0.3, 0.2, 0.2]
    whole, _ = follow(entropies)
    half, _ = follow(entropies[:5])
    again = EntropyControllerState.from_dict(json.loads(json.dumps(half.to_dict())))
    assert again == half
    assert follow(entropies[5:], again)[0] == whole


def test_bad_controllers_are_refused():
    with pytest.raises(ValueError, match="kl_cov must have low"):
        replace(KL_COV, rest=0.5)
    with pytest.raises(ValueError, match="different names"):
        replace(SETTINGS, actuators=(BONUS, BONUS))
    with pytest.raises(ValueError, match="at least one"):
        replace(SETTINGS, actuators=())
    with pytest.raises(ValueError, match="one value an actuator"):
        entropy_controller_step(replace(SETTINGS, actuators=(BONUS,)), initial_state(SETTINGS), 1.0)


def test_rank():
    assert rank_by_authority(["K", "clip_cov", "entropy_coef"]) == ("entropy_coef", "clip_cov", "K")
    with pytest.raises(ValueError, match="temperature"):
        rank_by_authority(["temperature"])
