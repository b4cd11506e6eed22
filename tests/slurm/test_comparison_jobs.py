"""A comparison whose cells are Slurm jobs: they outlive a stop, and the same command takes them up. The programs inside
the jobs are stand-ins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.throwaway import PATIENCE_S, ThrowawaySlurm, wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slurm

MATRIX = """
name: toy
title: A toy
baseline: grpo
seeds: [0]
base:
  - experiment=quickstart
  - model.scratch=null
  - warm_start.enabled=false
  - warm_start.check_every=50
  - model.path={model}
  - parallel.tp=1
  - train.steps=2
  - checkpoint.every=1
methods:
  grpo: [advantage=grpo]
  qae: [advantage=qae]
"""
CLUSTER = """
venv: {venv}
time_limit: "10"
stop_before_limit_s: 60
server_nodes: 0
colocated: true
environment: {{GO: {go}}}
"""
# Ends when it may, and leaves what a training leaves.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from megatron_rlvr.report.metrics_writer import MetricsWriter
from megatron_rlvr.report.run_directory import run_directory
from tests.slurm import stand_in

module, arguments = sys.argv[2], sys.argv[3:]
code = stand_in.main(module, arguments)
if module == "megatron_rlvr.train" and code == 0:
    while not Path(os.environ["GO"]).exists():
        time.sleep(0.05)
    given = stand_in.overrides_of(arguments)
    run = run_directory(given["output_dir"], given["experiment_name"], given["run_name"])
    loss = {"name": "ppo", "entropy_coef": 0.0, "kl_coef": 0.0}
    (run / "config.yaml").write_text(json.dumps({"advantage": {"estimator": given["advantage"]}, "loss": loss}))
    with MetricsWriter(run, tensorboard=False, wandb=False) as writer:
        for step in (1, 2):
            writer.write({"step": step, "reward/mean": 0.1 * step, "entropy/mean": 1.0, "eval/accuracy": 0.5})
sys.exit(code)
"""


def test_jobs_outlive_a_stop_and_are_taken_up(slurm: ThrowawaySlurm, tiny_qwen3: Path, tmp_path: Path) -> None:
    go, out = tmp_path / "go", tmp_path / "out"
    (tmp_path / "program.py").write_text(PROGRAM)
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {tmp_path / "program.py"} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "matrix.yaml").write_text(MATRIX.format(model=tiny_qwen3))
    (tmp_path / "cluster.yaml").write_text(CLUSTER.format(venv=tmp_path / "venv", go=go))
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "matrix.yaml", "--out", str(out)]
    command += ["--slurm", str(tmp_path / "cluster.yaml"), "--jobs", "2"]
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def logs() -> list[str]:
        return [path.read_text() for path in sorted((out / "logs").rglob("*.log"))]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.wait()
        return process.returncode, output

    def running() -> list[str]:
        return sorted(line.split()[0] for line in slurm.queue() if " RUNNING " in line)

    try:
        first = start()
        wait_for(lambda: len(running()) == 2 or first.poll() is not None, "two jobs")
        assert first.poll() is None, (end(first), logs())
        jobs = running()
        first.send_signal(signal.SIGTERM)
        code, output = end(first)
        assert (code, "stopped; the same command continues" in output) == (130, True), output
        assert running() == jobs, "both go on"

        second = start()
        taken = [f"job {job} works on this run already" for job in jobs]
        wait_for(lambda: all(any(line in log for log in logs()) for line in taken) or second.poll(), "the same jobs")
        go.touch()
        code, output = end(second)
    finally:
        go.touch()
    assert code == 0, (output, logs())
    slurm.assert_nothing_left()
    numbers = json.loads((out / "comparison.json").read_text())
    assert [method["name"] for method in numbers["methods"]] == ["grpo", "qae"]
    assert (out / "comparison.html").is_file()

    assert len(list((out / "runs").glob("*/seed-0/quickstart/*/job/attempt-*"))) == 2, "an attempt a cell"
