"""Processes that end together and leave nothing: neither children, nor sockets, nor shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PARENT_POLL_S = 0.25
SHARED_PREFIXES = ("sglang_loads_", "sgl_shm_", "sem.mp-")
"""Files in /dev/shm that SGLang and multiprocessing make and, when killed, leave."""


def watch_parent(parent_pid: int, on_death: Callable[[], None]) -> None:
    """Calls ``on_death`` from a daemon thread once ``parent_pid`` is no longer this process's parent.

    Polls rather than using PR_SET_PDEATHSIG, which fires already when the *thread* that started the child ends,
    and misses a parent that died before the call.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        on_death()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def scratch_folder(leader: int) -> Path:
    """Where the processes led by ``leader`` keep temporary files; SGLang's socket names must stay short."""
    return Path(tempfile.gettempdir()) / f"rlvr-{os.getuid()}-{leader}"


def own_scratch_folder() -> Path:
    """Makes this process's scratch folder and sends its temporary files, and its children's, there."""
    folder = scratch_folder(os.getpid())
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    return folder


def end_with_parent(parent_pid: int) -> None:
    """Makes this process, which leads its group, and all it starts be killed when the parent is gone.

    Also moves its temporary files to a scratch folder that goes with it.
    """
    scratch = own_scratch_folder()
    watch_parent(parent_pid, lambda: _kill_own_group(scratch))


def _kill_own_group(scratch: Path) -> None:
    pid = os.getpid()
    shared = shared_files(pid)
    if os.getpgid(0) == pid:
        # the others first: removing their files would make this process fail, and end, before it has killed them
        while others := [member for member in group_members(pid) if member != pid]:
            for member in others:
                try:
                    os.kill(member, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # ended by itself
    unlink(shared)
    shutil.rmtree(scratch, ignore_errors=True)
    os.kill(pid, signal.SIGKILL)


def group_members(group: int) -> Iterator[int]:
    """Live (not zombie) processes of a process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):  # ended while we looked
            continue
        if int(pgrp) == group and state not in "ZX":
            yield int(stat.parent.name)


def shared_files(group: int) -> set[Path]:
    """SGLang's and multiprocessing's files in /dev/shm that processes of the group have mapped."""
    mapped = set()
    for pid in group_members(group):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # ended while we looked
            continue
        # by inode: a semaphore is mapped under the name it had before it was linked to its final one
        mapped |= {int(line.split(maxsplit=5)[4]) for line in lines if "/dev/shm/" in line}
    files = set()
    for path in Path("/dev/shm").glob("*") if mapped else ():
        try:
            if path.name.startswith(SHARED_PREFIXES) and path.stat().st_ino in mapped:
                files.add(path)
        except FileNotFoundError:  # removed while we looked
            continue
    return files


def kill_children() -> None:
    """Ends what this process and its children have started, for good."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass  # ended by itself


def unlink(files: set[Path]) -> None:
    """Removes files that may be gone already."""
    for file in files:
        file.unlink(missing_ok=True)


def kill_group(process: subprocess.Popen[bytes], *, shared: set[Path] | None = None) -> None:
    """Ends for good a process that leads its own group: nothing of the group is left on return.

    Args:
        process: the leader, perhaps dead already.
        shared: files in /dev/shm known to belong to the group; those mapped now are found anyway.
    """
    files = (shared or set()) | shared_files(process.pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing left of it
    process.wait()
    while any(group_members(process.pid)):
        time.sleep(0.02)
    unlink(files)
    shutil.rmtree(scratch_folder(process.pid), ignore_errors=True)
