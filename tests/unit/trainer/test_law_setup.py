"""The law's tracker from a configuration, and a finished run as its reference."""

import math

import numpy as np
import pytest

from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.report.metrics_writer import MetricsWriter
from megatron_rlvr.trainer.diagnostics.law_setup import interventions, law_reference, law_tracker


def finished_run(folder, count=12):
    """A run that follows R = 0.56 - 0.17 exp(H)."""
    folder.mkdir()
    with MetricsWriter(folder, tensorboard=False, wandb=False) as writer:
        for step, entropy in enumerate(np.linspace(1.1, 0.2, count), start=1):
            accuracy = 0.56 - 0.17 * math.exp(entropy)
            writer.write({"step": step, "entropy/mean": float(entropy), "eval/accuracy": accuracy,
                          "eval/num_problems": 64})  # fmt: skip
    return folder


def test_a_run_is_held_against_a_plain_one(tmp_path):
    config = RunConfig()
    config.diagnostics.law_reference = str(finished_run(tmp_path / "plain"))
    config.diagnostics.law_patience = 2
    tracker = law_tracker(config)
    assert math.isclose(tracker.monitor.reference.ceiling, 0.39, abs_tol=1e-9)
    notes = []
    for step in (1, 2, 3):
        row = {"step": step, "entropy/mean": 0.9, "eval/accuracy": 0.5, "eval/num_problems": 64}
        notes.append(tracker.observe(row).notes)
    assert notes[0] == notes[2] == []
    [note] = notes[1]
    assert "law broken: held-out accuracy 50.0% at step 2" in note
    assert "ceiling of 39.0%" in note


def test_too_few_evaluations_are_no_reference(tmp_path):
    with pytest.raises(ValueError, match=r"law_reference must be the folder .* 3 evaluations or more, got 2"):
        law_reference(str(finished_run(tmp_path / "short", count=2)))


def test_what_acts_on_the_entropy():
    config = RunConfig()
    config.advantage.estimator = "grpo"
    assert interventions(config) == ()
    config.controller.target_entropy = 0.5
    config.loss.kl_coef = 0.1
    assert interventions(config) == ("reference KL", "entropy controller")
