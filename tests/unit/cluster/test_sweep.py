"""Sweeps over Slurm: the documented command composes, and tasks of a job know that they are ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rlvr.cluster.sweep import rank_environment

ROOT = Path(__file__).resolve().parents[3]


def test_the_documented_sweep_composes(tmp_path: Path) -> None:
    """As the command does it, up to the point where Slurm would be asked."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, "-m", "megatron_rlvr.train", "experiment=quickstart", "hydra/launcher=slurm"]
    command += ["hydra.launcher.partition=night", "advantage.K=0.2", "run_name=K-${advantage.K}", "--cfg", "hydra"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hydra = yaml.safe_load(done.stdout)["hydra"]
    launcher = hydra["launcher"]
    assert launcher["_target_"].endswith("submitit_launcher.SlurmLauncher")
    assert (launcher["partition"], launcher["tasks_per_node"], launcher["max_num_timeout"]) == ("night", 2, 3)
    assert hydra["callbacks"]["ranks"]["_target_"] == "megatron_rlvr.cluster.sweep.RanksFromSlurm"
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_task() -> None:
    task = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "node7",
        "SLURM_JOB_ID": "123456",
    }
    assert rank_environment(task) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "13456",
    }
    assert rank_environment({**task, "SLURM_NTASKS": "1"}) == {}
    assert rank_environment({**task, "SLURM_JOB_ID": "123457"})["MASTER_PORT"] == "13457"
