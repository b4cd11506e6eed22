"""The law's tracker of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path

from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.entropy.law import LawFit, active_interventions
from megatron_rlvr.entropy.law_tracker import LawTracker, law_of_points
from megatron_rlvr.report.evaluations import law_points
from megatron_rlvr.report.metrics_writer import read_metrics


def law_tracker(config: RunConfig) -> LawTracker:
    """The run's tracker of the law.

    Raises:
        ValueError: `diagnostics.law_reference` is not a run with a law.
    """
    return LawTracker(
        total_steps=config.train.steps,
        interventions=interventions(config),
        reference=law_reference(config.diagnostics.law_reference),
        patience=config.diagnostics.law_patience,
    )


def interventions(config: RunConfig) -> tuple[str, ...]:
    """What of the configuration acts on the entropy."""
    return active_interventions(
        estimator=config.advantage.estimator,
        policy_loss=config.loss.name,
        entropy_coef=config.loss.entropy_coef,
        kl_coef=config.loss.kl_coef,
        controlled=config.controller.target_entropy is not None,
    )


def law_reference(folder: str | None) -> LawFit | None:
    """The law of a finished run.

    Raises:
        ValueError: there is no run, or no law in it.
    """
    if folder is None:
        return None
    try:
        points = law_points(read_metrics(Path(folder)))
        return law_of_points(
            [(point.entropy, point.evaluation.accuracy, point.evaluation.num_problems or 1) for point in points]
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"diagnostics.law_reference must be the folder of a run with a law, got {folder!r}: {error}"
        ) from error
