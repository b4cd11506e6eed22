"""The count by covariance mass: its definition, monotone, scale-free, capped."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.entropy.selection_mass import mass_count

# Small multiples of 1/8: their sums are exact, so the definition can be held to the letter.
eighths = st.lists(st.integers(-400, 400).map(lambda n: n / 8), min_size=1, max_size=60)
shares = st.integers(1, 64).map(lambda n: n / 64)


@given(eighths, shares)
def test_count_is_the_smallest_that_reaches_the_share(covariances, share):
    n = mass_count(covariances, share, max_count=1000)
    ordered = sorted((Fraction(c) for c in covariances), reverse=True)
    target = Fraction(share) * sum(c for c in ordered if c > 0)
    assert sum(ordered[:n]) >= target
    assert n == 0 or sum(ordered[: n - 1]) < target
    assert n <= sum(c > 0 for c in ordered)


@given(eighths, shares, shares, st.integers(0, 80))
def test_count_rises_with_the_share_up_to_the_cap(covariances, one, other, cap):
    low, high = sorted((one, other))
    counts = [mass_count(covariances, share, max_count=cap) for share in (low, high)]
    assert counts[0] <= counts[1] <= cap
    free = mass_count(covariances, high, max_count=1000)
    assert counts[1] == min(free, cap)


@given(st.integers(0, 1000), shares, st.integers(-900, 900))
def test_count_does_not_depend_on_the_scale(seed, share, power):
    covariances = np.random.default_rng(seed).normal(size=200)
    expected = mass_count(covariances, share, max_count=200)
    assert mass_count(np.ldexp(covariances, power), share, max_count=200) == expected
    assert mass_count(covariances[::-1] * 3.7, share, max_count=200) == expected


def test_whole_share_takes_every_positive_token():
    covariances = np.random.default_rng(0).normal(size=10_000) * 1e-3
    assert mass_count(covariances, 1.0, max_count=10_000) == int((covariances > 0).sum())


def test_nothing_positive_selects_nothing():
    assert mass_count([-1.0, 0.0], 0.5, max_count=10) == 0
    assert mass_count([], 0.5, max_count=10) == 0


@pytest.mark.parametrize(
    ("covariances", "share", "cap", "word"),
    [([1.0], 0.0, 1, "share"), ([1.0], 1.5, 1, "share"), ([1.0], 0.5, -1, "cap|max_count"), ([np.nan], 0.5, 1, "nan")],
)
def test_bad_arguments_are_refused(covariances, share, cap, word):
    with pytest.raises(ValueError, match=word):
        mass_count(covariances, share, max_count=cap)
