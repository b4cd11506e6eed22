"""Largest values by share, against sorting."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.ops import top_shares

SHARES = [Fraction(1), Fraction(1, 2), Fraction(1, 5), Fraction(1, 50), Fraction(1, 500)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45]), st.floats(-10, 10, width=32)),
        min_size=1,
        max_size=300,
    )
)
def test_against_sorting(values):
    ordered = np.sort(np.array(values, np.float32).astype(np.float64))[::-1]
    for share, top in zip(SHARES, top_shares(torch.tensor(values), SHARES), strict=True):
        count = max(1, int(share * len(values)))
        assert top.count == count
        assert top.threshold == ordered[count - 1]
        assert top.mean == pytest.approx(ordered[:count].mean(), rel=1e-12, abs=1e-12)


def test_no_values():
    [top] = top_shares(torch.zeros(0), [Fraction(1, 2)])
    assert top.count == 0
    assert np.isnan([top.threshold, top.mean]).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 3/2"):
        top_shares(torch.zeros(3), [Fraction(3, 2)])
    with pytest.raises(ValueError, match="finite"):
        top_shares(torch.tensor([1.0, torch.nan]), SHARES)
