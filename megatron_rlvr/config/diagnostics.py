"""Instruments that watch the entropy and change nothing in the run."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DiagnosticsConfig:
    every: int = 0
    """Rollout steps between the costly measurements (per-token attribution P3, exact first order P4, entropy before
    and after on the same tokens M1, token maps); 0 is never. What is free (P1, P2, M2, the law) is always there."""
    probe_responses: int = 64
    """Responses of the step, evenly spread over its batch, on which P4 and M1 are measured: one forward and backward
    and one forward of these, and a copy of the weights before and after in host memory."""
    token_samples: int = 4
    """Responses whose tokens are kept one by one for the report's token map: half of them those in which the
    covariance loss selected most, where it did, the others samples of the step."""
    window: int = 50
    """Latest pairs of predicted and measured change behind correlation, slope and ratio."""
    law_reference: str | None = None
    """Folder of a finished run without interventions on the same model and data, whose law this run is held against;
    null: this run's own points."""
    law_patience: int = 3
    """Evaluations in a row above ceiling + 3 standard errors that make the event "law broken"."""
