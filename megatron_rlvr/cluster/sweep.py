"""Trainer ranks in the jobs of a sweep, which hydra-submitit-launcher starts with srun and without torchrun."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

LOWEST_PORT, NUM_PORTS = 10000, 10000
"""Below those that servers draw from and the ephemeral ones."""


class RanksFromSlurm(Callback):
    """Tells every task of a sweep's job its rank, in the variables that torchrun would set."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in each task, before the training begins."""
        if "SLURM_PROCID" in os.environ:
            os.environ.update(rank_environment(dict(os.environ)))


def rank_environment(slurm: dict[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a Slurm task.

    The port follows from the job's number, so that all tasks know it and two jobs on one node do not share it.
    """
    world_size = int(slurm["SLURM_NTASKS"])
    if world_size == 1:
        return {}  # a single process needs nobody to meet
    tasks_per_node = re.match(r"\d+", slurm["SLURM_TASKS_PER_NODE"])
    assert tasks_per_node is not None
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks_per_node[0],
        "MASTER_ADDR": _first_host(slurm["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(LOWEST_PORT + int(slurm["SLURM_JOB_ID"]) % NUM_PORTS),
    }


def _first_host(nodes: str) -> str:
    if not re.search(r"[\[,]", nodes):
        return nodes
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    return done.stdout.split()[0]
