"""``metrics.jsonl``: one object a rollout step, on disk before `write` returns; TensorBoard and wandb beside it."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of every rollout step.

    A number that is not finite is written as null, for JSON has no other word for it. Optional sinks get the finite
    ones only.

    Example:
        >>> with MetricsWriter(run_dir, tensorboard=False, wandb=False) as writer:
        ...     writer.write({"step": 1, "reward/mean": 0.25, "entropy/mean": 0.8})

    Args:
        run_dir: The run's folder, which must exist.
        tensorboard: Also write event files to ``run_dir/tensorboard``.
        wandb: Also log to Weights & Biases.
        wandb_project: Its project; wandb's own default when None.
        config: The resolved configuration, which wandb keeps with the run.

    Raises:
        ValueError: a sink was asked for whose package is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        wandb: bool,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        # Before anything is opened: a missing package must not leave a half-made run behind.
        board = _optional("tensorboard", "torch.utils.tensorboard") if tensorboard else None
        weights_and_biases = _optional("wandb", "wandb") if wandb else None
        self.path = Path(run_dir) / METRICS_FILE
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = board.SummaryWriter(log_dir=str(Path(run_dir) / "tensorboard")) if board else None
        self._wandb = (
            weights_and_biases.init(project=wandb_project, dir=str(run_dir), config=dict(config or {}))
            if weights_and_biases
            else None
        )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, metrics: Mapping[str, float | int | str | None]) -> None:
        """Appends one step's metrics.

        Args:
            metrics: Plain values by name, with an integer under ``step``.

        Raises:
            ValueError: no integer ``step``.
        """
        step = metrics.get("step")
        if not isinstance(step, int):
            raise ValueError(f"metrics['step'] must be an integer, got {step!r}")
        row = {key: _finite_or_none(value) for key, value in metrics.items()}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, global_step=step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def rewind(self, step: int) -> None:
        """Takes back the rows of later steps, which a resumed run writes again; the file changes whole or not at all.

        TensorBoard is told to hide what it has of them. Weights & Biases keeps its first rows of a step.
        """
        self._file.close()
        rows = read_metrics(self.path.parent)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            fresh = self.path.with_name(f".{self.path.name}.new")
            fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
            os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if self._tensorboard is not None and step:
            folder = self._tensorboard.log_dir
            self._tensorboard.close()
            self._tensorboard = type(self._tensorboard)(log_dir=folder, purge_step=step + 1)

    def close(self) -> None:
        """Closes every sink; a second call does nothing."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run so far, in the order written.

    A last line without its end, which a run that is being written or was killed may leave, is not a row.

    Raises:
        ValueError: a whole line is not a JSON object; the message names file and line.
        FileNotFoundError: the run has no metrics file.
    """
    path = Path(run_dir) / METRICS_FILE
    rows = []
    # Not splitlines(): it also splits at separators that a JSON string may hold.
    *whole_lines, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole_lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: must be a JSON object, got {line[:80]!r}")
        rows.append(row)
    return rows


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    # numpy and torch scalars become plain numbers here.
    plain = value.item() if hasattr(value, "item") else value
    return plain if isinstance(plain, int) or math.isfinite(plain) else None


def _drop_torn_line(path: Path) -> None:
    """Cuts off an unfinished last line, so that the next row does not run into it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))


def _optional(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"logging.{package} must be false where {package} is not installed, got true "
            f"(pip install {package}): {error}"
        ) from error
