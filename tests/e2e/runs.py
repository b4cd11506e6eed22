"""Runs the training command as a user does, and knows every process that it started."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "MEGATRON_RLVR_TEST_RUN"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A run that has ended."""

    code: int
    output: str
    survivors: list[str]
    """Command lines of processes that outlived it."""


def command(overrides: Sequence[str], *, ranks: int = 1) -> list[str]:
    """The command line: torchrun for several ranks, plain python for one."""
    if ranks == 1:
        return [sys.executable, "-m", "megatron_rlvr.train", *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "megatron_rlvr.train", *overrides]


def start(overrides: Sequence[str], *, ranks: int = 1, cwd: Path = ROOT) -> tuple[subprocess.Popen[str], str]:
    """Begins a run; returns it with the mark that its whole family carries in the environment."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark}
    process = subprocess.Popen(
        command(overrides, ranks=ranks),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, mark


def train(overrides: Sequence[str], *, ranks: int = 1, timeout_s: float = 300.0) -> Finished:
    """Runs to the end."""
    process, mark = start(overrides, ranks=ranks)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
        survivors = list(family(mark))
        for survivor in survivors:
            survivor.kill()
    return Finished(code=process.returncode, output=output, survivors=[_describe(p) for p in survivors])


def family(mark: str) -> Iterator[psutil.Process]:
    """Living processes of a run."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.NoSuchProcess:
        return f"pid {process.pid}, gone meanwhile"
