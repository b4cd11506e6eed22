"""What a run leaves of its steps: every row of the metrics at once, the report as often as the run does not feel it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from megatron_rlvr.report.html_report import write_report
from megatron_rlvr.report.metrics_writer import MetricsWriter

logger = logging.getLogger(__name__)
REPORT_SHARE = 0.02
"""Of a run's time, at most this goes into its report."""


class RunRecord:
    """Metrics and report of a run.

    The report is made from all steps so far: 0.06 s for twenty of them, 1.2 s for five thousand. It is written after
    the first step, then as often as `REPORT_SHARE` allows, and once more at the end, however the run ends.

    Args:
        metrics: where rows go, open; whoever opened it closes it.

    Example:
        >>> with MetricsWriter(run_dir, tensorboard=False, wandb=False) as metrics, RunRecord(metrics) as record:
        ...     record.write({"step": 1, "reward/mean": 0.25})
    """

    def __init__(self, metrics: MetricsWriter) -> None:
        self._metrics = metrics
        self._due = 0.0
        self._behind = False

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self._behind:
            return
        try:
            self._write_report()
        except (OSError, ValueError) as error:
            if kind is None:
                raise
            logger.warning("the report lacks the last steps: %s", error)  # what ends the run is the run's own error

    def write(self, row: Mapping[str, float | int | str | None]) -> None:
        """Adds a step; raises as `MetricsWriter.write` and `write_report`."""
        self._metrics.write(row)
        self._behind = True
        if time.monotonic() >= self._due:
            self._write_report()

    def rewind(self, step: int) -> None:
        """Takes back the rows of later steps."""
        self._metrics.rewind(step)
        self._behind = True

    def _write_report(self) -> None:
        started = time.monotonic()
        write_report(self._metrics.path.parent)
        ended = time.monotonic()
        self._due = ended + (ended - started) / REPORT_SHARE
        self._behind = False
