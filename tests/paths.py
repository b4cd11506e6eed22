"""Where processes that tests start find what they import."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path(*more: Path) -> str:
    """PYTHONPATH with this repository first, then folders of the test's own, then what the shell had put there."""
    return os.pathsep.join([str(ROOT), *map(str, more), *filter(None, [os.environ.get("PYTHONPATH")])])
