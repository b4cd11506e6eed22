"""The exit of the training command's process, while threads of its process groups may still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import atexit, sys
from megatron_rlvr.trainer.endings import SafeExit
class Late:
    def __del__(self):
        print("taken apart")
with SafeExit():
    late = Late()
    atexit.register(print, "handler")
    exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("last", "code", "words"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('a reason')", 1, "a reason"),
        ("raise RuntimeError('unforeseen')", 1, "unforeseen"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_the_code_and_all_handlers_but_no_taking_apart(last: str, code: int, words: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, last],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (code, "handler\n")
    assert words in ended.stderr
