"""Starts the ranks of a script as torchrun would, and ends them all when one fails.

The ranks are forked from a process that has torch and Megatron loaded already: importing them costs a rank five
seconds of a core, of which a suite with a hundred ranks would be mostly made.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest import mock

from megatron_rlvr.sync.process_group import open_store
from tests.paths import python_path

PRELOADED = ["tests.distributed.preloaded"]


def run_ranks(script: Path, arguments: Sequence[str], *, world_size: int, timeout_s: float = 240.0) -> None:
    """Runs ``world_size`` gloo ranks of a script to their end.

    Raises:
        AssertionError: a rank failed or took longer than ``timeout_s`` seconds; with the end of its output.
    """
    for rank, (code, text) in enumerate(end_of_ranks(script, arguments, world_size=world_size, timeout_s=timeout_s)):
        assert code == 0, f"rank {rank} of {world_size} ended with {code}:\n{text[-4000:]}"


def end_of_ranks(
    script: Path, arguments: Sequence[str], *, world_size: int, timeout_s: float = 240.0
) -> list[tuple[int | None, str]]:
    """Runs ranks and returns how each ended: its exit code (negative for a signal, None if it hung), and its output."""
    # As torchrun does: the ranks meet at a store that is there before them, so that nobody can take its port.
    store = open_store("127.0.0.1", timeout_s=timeout_s)
    environment = {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
    }
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        processes: list[ForkServerProcess] = []
        for rank, log in enumerate(logs):
            of_rank = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_run, args=(str(script), list(arguments), of_rank, str(log)))
            process.start()
            processes.append(process)
        try:
            _wait(processes, timeout_s)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
        return list(zip(codes, texts, strict=True))


def _wait(processes: Sequence[ForkServerProcess], timeout_s: float) -> None:
    """Until all have ended, one has failed and its peers had time to say so, or the time is up."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode not in (0, None):
            deadline = min(deadline, time.monotonic() + 20.0)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server keeps the environment that it is started in: what it preloads has to be found there.
    with mock.patch.dict(os.environ, {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In the forked rank: runs the script as ``python script arguments`` would."""
    with open(log, "wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
