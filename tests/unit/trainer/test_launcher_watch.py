"""A rank whose launcher is killed, as the kernel kills for want of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.trainer.launcher_watch import FOLDER_VARIABLE, PID_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import signal, sys
from pathlib import Path
from megatron_rlvr.trainer.launcher_watch import follow_launcher
from megatron_rlvr.trainer.stopping import StopSignals
stop = StopSignals(leave=sys.exit)
stop.install()
stop.hold()
follow_launcher(stop)
print("follows", flush=True)
while stop.reason is None:
    signal.sigtimedwait([], 0.05)
Path(sys.argv[1]).write_text(stop.reason)
"""
LAUNCHER = f"""
import os, subprocess, sys
ours = {{"{PID_VARIABLE}": str(os.getpid()), "{FOLDER_VARIABLE}": sys.argv[2]}}
os.environ |= ours if sys.argv[3] == "ours" else {{}}
os.environ |= {{"TORCHELASTIC_RUN_ID": "none"}} if sys.argv[3] == "torchrun" else {{}}
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}, sys.argv[1]])
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.parametrize("kind", ["ours", "torchrun"])
def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed(kind: str, tmp_path: Path) -> None:
    folder, told = tmp_path / "of torchrun", tmp_path / "told"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(told), str(folder), kind],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    try:
        assert launcher.stdout.readline() == "follows\n"
        assert rank.is_running()
        launcher.kill()
        launcher.wait()
        rank.wait(60)
    finally:
        launcher.kill()
        if rank.is_running():
            rank.kill()
    assert told.read_text() == f"the end of its launcher (pid {launcher.pid})"
    assert folder.exists() == (kind == "torchrun"), "what it would have removed is removed"
