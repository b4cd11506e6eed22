"""Starts the ranks of a script as torchrun would, and ends them all when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.sync.process_group import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(script: Path, arguments: Sequence[str], *, world_size: int, timeout_s: float = 240.0) -> None:
    """Runs ``world_size`` gloo ranks of a script to their end.

    Raises:
        AssertionError: a rank failed; with the end of its output.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port("127.0.0.1")),
        "WORLD_SIZE": str(world_size),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world_size} failed:\n{output[-4000:]}"
