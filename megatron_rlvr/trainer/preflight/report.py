"""What a preflight finds: one row a subject, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIB = 1 << 30


class Status(str, Enum):
    ok = "ok"
    warning = "warning"
    """It will run, though not as somebody who looks would want."""
    error = "error"
    """It cannot run, or will not end well."""
    skipped = "skipped"
    """Cannot be known here; the finding says why."""


STYLE = {Status.ok: "green", Status.warning: "yellow", Status.error: "bold red", Status.skipped: "dim"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was looked at."""

    subject: str
    status: Status
    finding: str
    advice: str = ""
    """Which option to change, where there is something to change."""


@dataclass(kw_only=True, slots=True)
class PreflightReport:
    """All that was looked at.

    Example:
        >>> report = preflight(config, Place(ranks_per_node=8, gpus_per_node=8))
        >>> if not report.ok: print_report(report)
    """

    rows: list[Row] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    """Bytes: ``trainer`` (a list, one entry a pipeline stage, by part) and ``server`` (weights, kv_per_token)."""

    @property
    def ok(self) -> bool:
        """Whether nothing stands against the run."""
        return all(row.status is not Status.error for row in self.rows)

    @property
    def errors(self) -> list[str]:
        """One line each."""
        return [f"{row.subject}: {row.finding}" for row in self.rows if row.status is Status.error]

    def add(self, subject: str, status: Status, finding: str, advice: str = "") -> None:
        self.rows.append(Row(subject=subject, status=status, finding=finding, advice=advice))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{**asdict(row), "status": row.status.value} for row in self.rows]
        return {"ok": self.ok, "rows": rows, "memory": self.memory}


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / (1 << 20):.0f} MiB"


def print_report(report: PreflightReport, console: Console) -> None:
    """The table, errors last, and what it comes to."""
    console.print(_table(report.rows))
    counts = {status: sum(row.status is status for row in report.rows) for status in Status}
    verdict = "ready" if report.ok else "not ready"
    console.print(f"{verdict}: {counts[Status.error]} errors, {counts[Status.warning]} warnings")


def _table(rows: Sequence[Row]) -> Table:
    table = Table(show_lines=False, pad_edge=False)
    for name in ("subject", "", "finding"):
        table.add_column(name, overflow="fold")
    for row in rows:
        finding = Text(row.finding)
        if row.advice:
            finding.append(f"\n{row.advice}", style="bold")
        table.add_row(row.subject, Text(row.status.value, style=STYLE[row.status]), finding)
    return table
