"""Where a run writes: ``<output_dir>/<experiment>/<run>/``, and ``<output_dir>/latest`` beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

RESOLVED_CONFIG = "config.yaml"
"""Name, inside a run's folder, of the configuration as it was composed."""


def run_directory(output_dir: str | Path, experiment_name: str, run_name: str | None = None) -> Path:
    """Makes the folder of a run and points ``<output_dir>/latest`` to it.

    A run with a name finds its folder again when it is started again. Without one it is named by the local time, with
    ``-2``, ``-3`` ... behind it where two start within one second; making the folder is what claims the name, so that
    concurrent starts never share one. ``latest`` is replaced in one step and is relative, so that ``output_dir`` can
    be moved.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: a name is not a single folder name, or `output_dir` cannot be written.

    Example:
        >>> run_directory("outputs", "quickstart")
        PosixPath('.../outputs/quickstart/2026-01-31_14-07-55')
    """
    if not experiment_name or experiment_name in (".", "..", "latest") or "/" in experiment_name:
        raise ValueError(f"experiment_name must be a folder name other than 'latest', got {experiment_name!r}")
    if run_name is not None and (not run_name or run_name in (".", "..") or "/" in run_name):
        raise ValueError(f"run_name must be a folder name, got {run_name!r}")
    root = Path(output_dir).absolute()
    try:
        if run_name is None:
            run = _claim(root / experiment_name)
        else:
            run = root / experiment_name / run_name
            run.mkdir(parents=True, exist_ok=True)
        _point_latest_to(run, root)
    except OSError as error:
        raise ValueError(f"output_dir must be a folder to write in, got {str(output_dir)!r}: {error}") from error
    return run


def _claim(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("%Y-%m-%d_%H-%M-%S")
    run, number = parent / stem, 1
    while True:
        try:
            run.mkdir()
        except FileExistsError:
            number += 1
            run = parent / f"{stem}-{number}"
        else:
            return run


def _point_latest_to(run: Path, root: Path) -> None:
    latest = root / "latest"
    # The claimed name keeps starts on other machines of the same file system apart.
    fresh = root / f".latest-{run.parent.name}-{run.name}"
    fresh.unlink(missing_ok=True)  # of a start of the same run that was killed right here
    fresh.symlink_to(run.relative_to(root), target_is_directory=True)
    try:
        os.replace(fresh, latest)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
