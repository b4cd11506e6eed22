"""Processes that end together: children that notice a dead parent, groups that stop as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

PARENT_POLL_S = 0.25


def watch_parent(parent_pid: int, on_death: Callable[[], None]) -> None:
    """Calls ``on_death`` from a daemon thread once ``parent_pid`` is no longer this process's parent.

    Polls rather than using PR_SET_PDEATHSIG, which fires already when the *thread* that started the child ends,
    and loses a parent that died before the call.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        on_death()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def kill_own_group() -> None:
    """SIGKILL to this process and everything it started, if it leads its process group; else to itself."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def group_alive(group: int) -> bool:
    """Whether a live (not zombie) process is left in the process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # ended while we looked
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False


def stop_group(process: subprocess.Popen[bytes], *, grace_s: float) -> None:
    """Ends a process that leads its own group, with everything in the group, and reaps it.

    SIGTERM to the leader, SIGKILL to the whole group once the leader is gone or ``grace_s`` has passed.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            pass
    kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the group a process leads, waiting until nothing of it is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing left of it
    process.wait()
    while group_alive(process.pid):
        time.sleep(0.02)
