"""pass@k against vectors and brute force; the interval against its binomial case."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.entropy.passk import pass_at_k, pass_at_k_with_interval

CASES = json.loads((Path(__file__).parents[2] / "data" / "entropy_vectors.json").read_text())["E6_pass_at_k"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c['n']}-c{c['c']}-k{c['k']}")
def test_vectors(case):
    assert math.isclose(pass_at_k(case["n"], case["c"], case["k"]), case["pass_at_k"], rel_tol=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 1), (6, 2, 3), (7, 5, 3), (5, 0, 2), (5, 5, 5)])
def test_is_the_share_of_subsets_with_a_right_sample(n, c, k):
    subsets = list(itertools.combinations(range(n), k))
    assert math.isclose(pass_at_k(n, c, k), sum(min(s) < c for s in subsets) / len(subsets), rel_tol=1e-15)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_is_unbiased(p):
    n, k = 12, 5
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = math.fsum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert math.isclose(mean, 1 - (1 - p) ** k, rel_tol=1e-12)


def test_interval_of_all_or_nothing_problems_is_the_binomial_one():
    found = pass_at_k_with_interval([1] * 100, [1] * 30 + [0] * 70, 1, seed=5)
    assert math.isclose(found.mean, 0.3, rel_tol=1e-12)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert abs(found.low - (0.3 - half)) < 0.015
    assert abs(found.high - (0.3 + half)) < 0.015


def test_interval_is_seeded_and_holds_the_mean():
    correct = np.random.default_rng(1).integers(0, 33, 30).tolist()
    one, two, other = (pass_at_k_with_interval([32] * 30, correct, 16, seed=s) for s in (0, 0, 1))
    assert one == two
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low < one.mean < one.high
    wider = pass_at_k_with_interval([32] * 30, correct, 16, level=0.99)
    assert wider.low < one.low
    assert wider.high > one.high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        p = rng.beta(1, 1, 60)
        correct = rng.binomial(8, p).tolist()
        found = pass_at_k_with_interval([8] * 60, correct, 4, num_resamples=1000)
        hits += found.low <= 0.8 <= found.high  # E[1 - (1 - p)^4] over the uniform is 4/5
    assert 0.87 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("samples", "correct", "k", "word"),
    [([4], [5], 1, "num_correct"), ([4], [1], 5, "k must"), ([4], [1], 0, "k must"), ([], [], 1, "problem")],
)
def test_bad_counts_are_refused(samples, correct, k, word):
    with pytest.raises(ValueError, match=word):
        pass_at_k_with_interval(samples, correct, k)
