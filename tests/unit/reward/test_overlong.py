"""Soft overlong punishment against the vectors of DAPO's setting (E3) and other settings by hand."""

import pytest

from megatron_rlvr.reward.overlong import overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (16384, 0.0), (16385, -0.000244140625), (17408, -0.25), (18432, -0.5), (20480, -1.0)],
)
def test_vectors_of_dapo(length, penalty):
    assert overlong_penalty(length, max_length=20480, buffer=4096) == pytest.approx(penalty, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("length", "factor", "penalty"), [(90, 0.5, 0.0), (95, 0.5, -0.25), (100, 2.0, -2.0), (99, 0.0, 0.0)]
)
def test_other_settings(length, factor, penalty):
    assert overlong_penalty(length, max_length=100, buffer=10, factor=factor) == pytest.approx(penalty, rel=1e-12)


@pytest.mark.parametrize(
    ("buffer", "factor", "message"), [(0, 1.0, "got 0"), (101, 1.0, "got 101"), (5, -1.0, "got -1")]
)
def test_refuses(buffer, factor, message):
    with pytest.raises(ValueError, match=message):
        overlong_penalty(3, max_length=100, buffer=buffer, factor=factor)
