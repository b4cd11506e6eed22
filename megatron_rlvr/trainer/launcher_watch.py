"""Ranks do not outlive the process that launched them, however it ends.

A launcher that gets a signal passes it on; one that is killed with SIGKILL, by the system for want of memory say,
cannot. Its ranks then take its end for a request to stop: they save a checkpoint and end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time

import psutil

from megatron_rlvr.trainer.endings import FAILED
from megatron_rlvr.trainer.stopping import StopSignals

PID_VARIABLE = "MEGATRON_RLVR_LAUNCHER_PID"
FOLDER_VARIABLE = "MEGATRON_RLVR_LAUNCHER_FOLDER"
POLL_S = 0.5
END_S = 60.0
"""For a rank to save and to end in good order; then it ends without."""


def follow_launcher(stop: StopSignals) -> None:
    """Asks this process to stop once its launcher is gone, and ends it `END_S` later at the latest.

    The launcher is the one that `megatron_rlvr.launch` names in the environment, torchrun where that was started
    directly; without either nothing is watched.

    Args:
        stop: this process's requests to stop, installed.
    """
    if PID_VARIABLE in os.environ:
        pid = int(os.environ[PID_VARIABLE])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        pid = os.getppid()
    else:
        return
    try:
        launcher = psutil.Process(pid)
    except psutil.NoSuchProcess:
        launcher = None  # gone already
    threading.Thread(target=_watch, args=(launcher, pid, stop), name="launcher-watch", daemon=True).start()


def _watch(launcher: psutil.Process | None, pid: int, stop: StopSignals) -> None:
    while launcher is not None and _is_alive(launcher):
        time.sleep(POLL_S)
    if FOLDER_VARIABLE in os.environ:
        shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)  # nobody else would
    stop.because = f"the end of its launcher (pid {pid})"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    print(f"error: the launcher (pid {pid}) is gone and this rank could not end in order", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
