"""Where the cells of a comparison lie on disk, and which of them are finished.

``<out>/runs/<method>/seed-<n>/<experiment>/<run>/`` is a run's own folder, ``<out>/logs/`` what the cells printed,
``<out>/cells/<method>/seed-<n>.json`` says that a cell has ended well, and where its run lies.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rlvr.comparison.matrix import Cell
from megatron_rlvr.report.metrics_writer import METRICS_FILE, read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRecord:
    """A finished cell."""

    method: str
    seed: int
    fingerprint: str
    overrides: list[str]
    run_dir: str
    """Relative to the comparison's folder."""
    wall_s: float
    """Seconds of the whole process, its start included; with what else ran on the machine at the time."""
    shared_server: bool
    """Whether it used the server of all cells rather than one of its own."""
    made_start: bool
    """Whether it made the warm start, which its wall time then includes."""


def run_root(out: Path, cell: Cell) -> Path:
    """The cell's ``output_dir``."""
    return out / "runs" / cell.name


def log_path(out: Path, cell: Cell) -> Path:
    """Where its output goes."""
    return out / "logs" / f"{cell.name}.log"


def record_path(out: Path, cell: Cell) -> Path:
    """Where it is noted as finished."""
    return out / "cells" / f"{cell.name}.json"


def write_record(out: Path, cell: Cell, record: CellRecord) -> None:
    """Notes a finished cell, in one step."""
    path = record_path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def finished(out: Path, cell: Cell) -> CellRecord | None:
    """The cell's record if it ended well under the same overrides and its metrics are there, else None.

    Raises:
        ValueError: the record is broken.
    """
    path = record_path(out, cell)
    if not path.is_file():
        return None
    try:
        record = CellRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a cell's record, got {error}; remove it to run the cell again") from error
    if record.fingerprint != cell.fingerprint or not (out / record.run_dir / METRICS_FILE).is_file():
        return None
    return record


def steps_done(out: Path, cell: Cell) -> int:
    """Rollout steps of the cell's newest run; 0 before the first."""
    try:
        rows = read_metrics(run_root(out, cell) / "latest")
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return int(rows[-1]["step"]) if rows else 0
