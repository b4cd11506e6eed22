"""Runs the training command as a user does, and knows every process that it started."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.paths import ROOT, python_path

MARK = "MEGATRON_RLVR_TEST_RUN"
FOLLOW_S = 20.0
"""For how long a process of a run may outlive it: each looks for its parent every second at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A run that has ended."""

    code: int
    output: str
    survivors: list[str]
    """Command lines of processes that outlived it."""


def command(overrides: Sequence[str], *, ranks: int = 1, module: str = "megatron_rlvr.train") -> list[str]:
    """The command line: that of ``make train`` for several ranks, plain python for one."""
    if ranks == 1:
        return [sys.executable, "-m", module, *overrides]
    launcher = [sys.executable, "-m", "megatron_rlvr.launch", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", module, *overrides]


def start(
    overrides: Sequence[str], *, ranks: int = 1, cwd: Path = ROOT, module: str = "megatron_rlvr.train"
) -> tuple[subprocess.Popen[str], str]:
    """Begins a run; returns it with the mark that its whole family carries in the environment."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), MARK: mark}
    process = subprocess.Popen(
        command(overrides, ranks=ranks, module=module),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, mark


def train(
    overrides: Sequence[str], *, ranks: int = 1, timeout_s: float = 300.0, module: str = "megatron_rlvr.train"
) -> Finished:
    """Runs to the end."""
    process, mark = start(overrides, ranks=ranks, module=module)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
        survivors = outliving(mark)
        for survivor in survivors:
            survivor.kill()
    return Finished(code=process.returncode, output=output, survivors=[_describe(p) for p in survivors])


def outliving(mark: str) -> list[psutil.Process]:
    """Processes of a run that do not follow it: each looks for its parent now and then, and ends by itself."""
    _, alive = psutil.wait_procs(list(family(mark)), timeout=FOLLOW_S)
    return alive


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


def assert_servers_agree(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every step's responses were sampled from the trainer's weights, as the log-probs of both sides show (fp32).

    A step whose few tokens with an advantage agree to the last bit is no rarity; a run of them compares nothing.
    """
    gaps = [row["rollout/logprob_diff_max"] for row in rows]
    assert all(0 <= gap < 1e-4 for gap in gaps), gaps
    assert any(gap > 0 for gap in gaps), gaps
