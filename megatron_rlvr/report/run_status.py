"""``status.json``: how a run stands or ended, for whoever started it; see `megatron_rlvr.config.checkpoints`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STATUS_FILE = "status.json"


class RunStatus:
    """Writes the file at every change, whole or not at all.

    Args:
        run_dir: the run's folder; None writes nothing (ranks other than 0).
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._path = None if run_dir is None else run_dir / STATUS_FILE
        self._status: dict[str, Any] = {
            "state": "running",
            "step": 0,
            "checkpoint": None,
            "exit_code": None,
            "reason": None,
        }

    def __enter__(self) -> RunStatus:
        self.update()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._status["state"] != "running":
            return
        if error is None:
            self.update(state="finished", exit_code=0)
        elif isinstance(error, KeyboardInterrupt):
            self.update(state="failed", exit_code=130, reason="stopped at once by a signal")
        else:
            self.update(state="failed", exit_code=1, reason=f"{type(error).__name__}: {error}"[:2000])

    def update(self, **changes: Any) -> None:
        """Changes fields of the status: state, step, checkpoint, exit_code, reason."""
        self._status |= changes
        if self._path is None:
            return
        fresh = self._path.with_name(f".{STATUS_FILE}.new")
        try:
            fresh.write_text(json.dumps(self._status) + "\n", encoding="utf-8")
            os.replace(fresh, self._path)
        except OSError:
            # A full disk: the run's own end says what happened, and this must not hide it.
            fresh.unlink(missing_ok=True)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The status of a run; None where it has not begun."""
    path = run_dir / STATUS_FILE
    if not path.is_file():
        return None
    status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return status
