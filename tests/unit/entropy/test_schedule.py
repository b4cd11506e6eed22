"""Schedules of K by exact tables, and the dithered rank's mean and independence of order."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.entropy.schedule import ConstantK, CosineK, PiecewiseLinearK, TwoPhaseK, dithered_rank, on_grid
from megatron_rlvr.ops.exact import quantile_rank

CASES = json.loads((Path(__file__).parents[2] / "data" / "entropy_vectors.json").read_text())["G2_dithered_rank"]


def test_constant():
    assert [ConstantK("1/3").at(step) for step in (0, 7, 10**6)] == [Fraction(1, 3)] * 3
    assert ConstantK(0.28).at(0) == Fraction(7, 25)


def test_two_phase():
    schedule = TwoPhaseK("0.6", "0.4", switch_step=100)
    assert [schedule.at(s) for s in (0, 99, 100, 5000)] == [Fraction(3, 5)] * 2 + [Fraction(2, 5)] * 2


def test_piecewise_linear():
    schedule = PiecewiseLinearK([(10, "0.6"), (20, "0.4"), (26, "0.8")])
    expected = {0: "0.6", 10: "0.6", 11: "0.58", 15: "0.5", 20: "0.4", 21: "0.466667", 23: "0.6", 26: "0.8", 99: "0.8"}
    assert {step: schedule.at(step) for step in expected} == {s: Fraction(k) for s, k in expected.items()}


def test_piecewise_linear_gives_given_levels_back_exactly():
    schedule = PiecewiseLinearK([(0, "1/3"), (3, "1/7"), (5, "2/3")])
    assert [schedule.at(s) for s in (0, 3, 5, 6)] == [Fraction(1, 3), Fraction(1, 7), Fraction(2, 3), Fraction(2, 3)]


def test_cosine():
    schedule = CosineK("0.6", "0.4", first_step=10, last_step=22)
    expected = {0: "0.6", 10: "0.6", 13: "0.570711", 14: "0.55", 16: "0.5", 18: "0.45", 19: "0.429289", 22: "0.4"}
    assert {step: schedule.at(step) for step in expected} == {s: Fraction(k) for s, k in expected.items()}


@pytest.mark.parametrize(
    "schedule",
    [PiecewiseLinearK([(0, "0.2"), (977, "0.8")]), CosineK("0.2", "0.8", last_step=977)],
    ids=["linear", "cosine"],
)
def test_rank_rises_one_at_a_time_and_only_past_multiples_of_1_over_g(schedule):
    levels = [schedule.at(step) for step in range(1000)]
    assert all((level * 10**6).denominator == 1 for level in levels)
    ranks = [quantile_rank(level, 16) for level in levels]
    assert (ranks[0], ranks[-1]) == (4, 13)
    for before, after, low, high in zip(ranks, ranks[1:], levels, levels[1:], strict=False):
        assert after - before in (0, 1)
        assert (after > before) == (low <= Fraction(before, 16) < high)


def test_grid_takes_floats_by_their_decimals():
    assert on_grid(0.30000000000000004) == Fraction(3, 10)
    assert on_grid(Fraction(1, 3)) == Fraction(333333, 10**6)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ConstantK("1"), "K must be in"),
        (lambda: ConstantK("high"), "high"),
        (lambda: ConstantK(float("nan")), "nan"),
        (lambda: TwoPhaseK("0.6", "0.0", switch_step=1), "second"),
        (lambda: TwoPhaseK("0.6", "0.4", switch_step=-1), "switch_step"),
        (lambda: CosineK("0.6", "0.4", first_step=5, last_step=5), "last_step"),
        (lambda: PiecewiseLinearK([]), "at least one"),
        (lambda: PiecewiseLinearK([(5, "0.4"), (5, "0.6")]), "ascending"),
        (lambda: ConstantK("0.4").at(-1), "step"),
        (lambda: dithered_rank(Fraction(2, 5), 0), "group_size"),
    ],
)
def test_bad_schedules_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"G{c['G']}-K{c['K']}")
def test_dithered_ranks(case):
    rank = dithered_rank(Fraction(case["K"]), case["G"])
    assert (rank.low, rank.high, rank.prob_high) == (case["m_low"], case["m_high"], Fraction(case["prob_high"]))


def test_mean_of_the_drawn_rank_is_k_g():
    rank = dithered_rank(Fraction("0.45"), 8)
    draws = np.array([rank.draw(seed=7, step=i // 512, group=i % 512) for i in range(100_000)])
    assert set(draws.tolist()) == {3, 4}
    # Five standard deviations of the mean of a Bernoulli(0.6).
    assert abs(draws.mean() - 3.6) < 5 * np.sqrt(0.24 / len(draws))
    by_step = draws[: 512 * 195].reshape(195, 512).astype(float)
    assert abs(np.corrcoef(by_step[:-1].ravel(), by_step[1:].ravel())[0, 1]) < 0.02


def test_draws_depend_on_each_counter_and_on_nothing_else():
    rank = dithered_rank(Fraction("0.45"), 8)

    def row(**counters):
        return [rank.draw(**{"seed": 1, "step": 3, "group": 5, **counters, name: i}) for i in range(64)]

    rows = {}
    for name in ("seed", "step", "group"):
        rows[name] = row()
        assert rows[name] == row()
        assert len(set(rows[name])) == 2
    assert len({tuple(r) for r in rows.values()}) == 3


@given(st.integers(1, 999_999), st.integers(1, 64))
def test_dithered_mean_is_exact_above_one_over_g(millionths, size):
    level = Fraction(millionths, 10**6)
    rank = dithered_rank(level, size)
    mean = rank.low + (rank.high - rank.low) * rank.prob_high
    assert mean == max(level * size, 1)
    assert 1 <= rank.low <= rank.high <= size
    assert rank.high == quantile_rank(level, size)
