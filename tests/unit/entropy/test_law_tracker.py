"""The law over the rows of a run: the same points as tools/law.py takes, early prediction, events, resumption."""

import json
import math

import numpy as np
import pytest

from megatron_rlvr.entropy.law import fit_law, predict_early
from megatron_rlvr.entropy.law_tracker import LawTracker, law_of_points
from megatron_rlvr.report.evaluations import law_points

STEPS = 40


def made_rows(*, every=2, jump_from=STEPS + 1):
    """A run that follows the law, evaluated every second step; from `jump_from` on it is far above its ceiling."""
    rng = np.random.default_rng(1)
    rows = []
    for step, entropy in enumerate(np.linspace(1.1, 0.2, STEPS), start=1):
        accuracy = 0.56 - 0.17 * math.exp(entropy) + rng.normal(0, 0.003)
        row = {"step": step, "entropy/sequence_mean": float(entropy), "entropy/mean": 9.0}
        if step == 1:
            row |= {"eval/start_accuracy": accuracy - 0.001, "eval/num_problems": 256}
        if step % every == 0:
            row |= {"eval/accuracy": accuracy + 0.2 * (step >= jump_from), "eval/num_problems": 256}
        rows.append(row)
    return rows


def watch(tracker, rows):
    return [tracker.observe(row) for row in rows]


def test_last_fit_is_that_of_the_finished_run():
    rows = made_rows()
    tracker = LawTracker(total_steps=STEPS)
    news = watch(tracker, rows)
    points = law_points(rows)
    assert len(points) == 21
    fit = fit_law([p.entropy for p in points], [p.evaluation.accuracy for p in points])
    last = news[-1].metrics
    assert last["law/num_points"] == 21
    for name in ("a", "a_se", "b", "b_se", "ceiling", "ceiling_se", "r2", "p_value"):
        assert math.isclose(last[f"law/{name}"], getattr(fit, name), rel_tol=1e-9), name
    assert last["law/valid"] == 1.0
    assert abs(last["law/ceiling"] - 0.39) < 4 * last["law/ceiling_se"]
    assert abs(last["law/one_step_error"]) < 0.02
    # Without an evaluation there is nothing to say.
    assert news[-2].metrics == {}


def test_early_prediction_is_stored_and_scored_at_the_end():
    rows = made_rows()
    tracker = LawTracker(total_steps=STEPS)
    news = watch(tracker, rows)
    points = law_points(rows)
    H, R = [p.entropy for p in points], [p.evaluation.accuracy for p in points]
    early = predict_early(H, R, steps=[p.evaluation.step for p in points])
    # 15% of 40 steps: the start, and steps 2, 4 and 6.
    assert early.fit.num_points == 4
    assert tracker.early == early.fit
    assert tracker.early_step == 6
    assert math.isclose(news[-1].metrics["law/early_rmse"], early.rmse, rel_tol=1e-9)
    assert math.isclose(news[-1].metrics["law/early_error"], early.final_error, rel_tol=1e-9)
    notes = [note for each in news for note in each.notes]
    assert notes[0].startswith("law from 4 evaluations up to step 6: ceiling ")
    assert notes[-1] == (
        f"law of step 6 against 17 later evaluations: off by {early.rmse * 100:.1f} points (root mean square)"
    )


def test_broken_law_is_an_event_once():
    tracker = LawTracker(total_steps=STEPS, patience=3)
    news = watch(tracker, made_rows(jump_from=31))
    broken = [i + 1 for i, each in enumerate(news) if each.metrics.get("law/broken")]
    # The first evaluation above is that of step 32.
    assert broken == [36]
    [note] = [note for each in news for note in each.notes if note.startswith("law broken")]
    assert "at step 36, in 3 evaluations in a row above the ceiling" in note


def test_interventions_make_it_not_valid():
    tracker = LawTracker(total_steps=STEPS, interventions=("qae",))
    news = watch(tracker, made_rows())
    assert news[-1].metrics["law/valid"] == 0.0
    assert any("active: qae" in note for each in news for note in each.notes)


def test_resumes_at_any_step():
    rows = made_rows(jump_from=31)
    whole = LawTracker(total_steps=STEPS)
    expected = watch(whole, rows)
    for cut in (1, 5, 6, 7, 33, 35, 39):
        first, second = LawTracker(total_steps=STEPS), LawTracker(total_steps=STEPS)
        watch(first, rows[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert watch(second, rows[cut:]) == expected[cut:]


def test_law_of_a_finished_run_needs_points():
    with pytest.raises(ValueError, match="3 evaluations or more, got 2"):
        law_of_points([(1.0, 0.1, 8), (0.5, 0.2, 8)])
