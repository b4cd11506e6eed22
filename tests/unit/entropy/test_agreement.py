"""Agreement of predicted and measured changes."""

import json
import math

import numpy as np
import pytest

from megatron_rlvr.entropy.agreement import AgreementWindow, agreement


def test_scaled_and_shifted_series():
    p = np.array([-0.03, -0.01, 0.02, -0.04])
    found = agreement(p, 1.2 * p - 0.001)
    assert math.isclose(found.correlation, 1.0, rel_tol=1e-12)
    assert math.isclose(found.slope, 1.2, rel_tol=1e-12)
    assert math.isclose(found.ratio, (1.2 * -0.06 - 0.004) / -0.06, rel_tol=1e-12)
    assert found.sign_agreement == 1.0


def test_against_numpy():
    p, m = np.random.default_rng(0).normal(size=(2, 40))
    found = agreement(p, m)
    assert math.isclose(found.correlation, np.corrcoef(p, m)[0, 1], rel_tol=1e-12)
    assert math.isclose(found.slope, np.polyfit(p, m, 1)[0], rel_tol=1e-9)
    assert math.isclose(found.sign_agreement, np.mean(p * m > 0), rel_tol=1e-12)


def test_undetermined_numbers_are_nan():
    flat = agreement([0.1, 0.1], [0.0, 0.0])
    assert math.isnan(flat.correlation)
    assert math.isnan(flat.slope)
    assert math.isnan(flat.sign_agreement)
    assert flat.ratio == 0.0
    assert agreement([], []).num_steps == 0


def test_window_forgets_and_resumes():
    pairs = np.random.default_rng(1).normal(size=(12, 2)).tolist()
    window = AgreementWindow(size=5)
    for p, m in pairs[:8]:
        window.add(p, m)
    resumed = AgreementWindow(size=5)
    resumed.load_state_dict(json.loads(json.dumps(window.state_dict())))
    for p, m in pairs[8:]:
        found = resumed.add(p, m)
        assert found == window.add(p, m)
    assert found == agreement(*np.array(pairs[-5:]).T)


def test_bad_values_are_refused():
    window = AgreementWindow(size=5)
    with pytest.raises(ValueError, match="finite"):
        window.add(math.nan, 0.1)
    with pytest.raises(ValueError, match=r"\[n\]"):
        agreement([0.1], [0.1, 0.2])
