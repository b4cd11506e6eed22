"""The job script on a real Slurm: how a job starts, is told to stop, comes back and ends. The programs inside are
stand-ins (`stand_in.py`); `test_training_jobs.py` runs the real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.cluster.script import Job, render
from megatron_rlvr.config.compose import load_cluster
from tests.slurm.throwaway import NODES, ThrowawaySlurm, wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slurm


class Submitted:
    """A job of stand-ins."""

    def __init__(self, slurm: ThrowawaySlurm, job: Job) -> None:
        self.slurm, self.job = slurm, job
        script = job.run_dir / "job" / "job.sbatch"
        script.parent.mkdir(parents=True)
        script.write_text(render((ROOT / "slurm" / "train.sbatch").read_text(), job))
        self.id = int(slurm.run(["sbatch", "--parsable", str(script)]))

    @property
    def steps(self) -> list[int]:
        path = self.job.run_dir / "steps.txt"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def attempts(self) -> list[dict[str, Any]]:
        path = self.job.run_dir / "seen.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def log(self) -> str:
        return self.job.log.read_text() if self.job.log.exists() else ""

    def state(self) -> str:
        return self.slurm.run(["squeue", "-h", "-t", "all", "-j", str(self.id), "-o", "%T"]).split()[0]

    def wait_steps(self, number: int) -> None:
        wait_for(lambda: len(self.steps) >= number or self.state() in ("FAILED", "COMPLETED"), f"{number} steps")
        assert len(self.steps) >= number, self.log

    def wait_end(self) -> str:
        """The final state; nothing of the job is left."""
        self.slurm.assert_nothing_left()
        assert not list(Path(tempfile.gettempdir()).glob(f"rlvr-job-{self.id}-*")), "temporary folders are gone"
        return self.state()


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python is the stand-in."""
    python = tmp_path / "stand_in" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {ROOT}/tests/slurm/stand_in.py "$@"\n')
    python.chmod(0o755)
    return tmp_path / "stand_in"


@pytest.fixture
def submit(slurm: ThrowawaySlurm, venv: Path, tmp_path: Path):
    """Submits a job of stand-ins."""

    def submit(name: str, cluster: list[str], plan: list[str]) -> Submitted:
        config = load_cluster(["cluster=cpu", f"cluster.venv={venv}", "cluster.time_limit=10", *cluster])
        job = Job(
            name=name,
            run_dir=tmp_path / "out put" / "stand_in" / name,
            overrides=("train.steps=6", "plan.step_s=0.3", "checkpoint.every=2", "rollout.min_servers=1", *plan),
            workdir=tmp_path,
            source_dir=None,
            python=f"{config.venv}/bin/python",
            cluster=config,
        )
        return Submitted(slurm, job)

    return submit


def test_two_jobs_share_a_node_and_leave_nothing(submit, slurm: ThrowawaySlurm, tmp_path: Path) -> None:
    """Also: a colocated job's trainer and servers have GPUs of their own, and each task what the job promised it."""
    together = ["cluster.server_nodes=0", "cluster.colocated=true", f"cluster.sbatch_options=['--nodelist={NODES[0]}']"]
    if slurm.num_gpus:
        together += ["cluster.gpus_per_node=1", "cluster.server_gpus_per_node=1", "cluster.ranks_per_node=1"]
    together += ["+cluster.environment.PLANNED='as asked'"]
    jobs = [submit(name, together, ["plan.step_s=1"]) for name in ("one", "two")]
    wait_for(lambda: all(job.attempts for job in jobs), "start of both")
    one, two = (job.attempts[0] for job in jobs)
    assert [job.state() for job in jobs] == ["RUNNING", "RUNNING"], "both at once"
    assert one["nodes"] == two["nodes"] == NODES[0]
    for name in ("TMPDIR", "MASTER_PORT", "key", *(["CUDA_VISIBLE_DEVICES"] if slurm.num_gpus else [])):
        assert one[name] != two[name]
    assert one["TMPDIR"].startswith(f"{tempfile.gettempdir()}/rlvr-job-")
    assert one["cwd"] == str(tmp_path)
    assert one["PLANNED"] == "as asked"
    assert [job.wait_end() for job in jobs] == ["COMPLETED", "COMPLETED"]
    assert [job.steps for job in jobs] == [[1, 2, 3, 4, 5, 6]] * 2
    assert (jobs[0].job.run_dir / "job" / "exit_code").read_text() == "0\n"
    for path in (jobs[0].job.run_dir / "job").rglob("*"):
        assert path.is_dir() or one["key"] not in path.read_text(), f"{path} shows the key"


def test_the_template_works_by_hand(slurm: ThrowawaySlurm, venv: Path, tmp_path: Path) -> None:
    """As it lies in the repository, with the Python on the path."""
    environment = {**slurm.environment, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", str(ROOT / "slurm" / "train.sbatch"), "train.steps=3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    slurm.assert_nothing_left()
    run = tmp_path / "outputs" / "by_hand" / f"job-{done.stdout.strip()}"
    assert (run / "job" / "exit_code").read_text() == "0\n", [path.read_text() for path in tmp_path.glob("*.out")]
    assert (run / "steps.txt").read_text() == "1\n2\n3\n"


def test_endings(submit, slurm: ThrowawaySlurm) -> None:
    """What requeues and what does not, and when a job gives up; all of them at once."""
    # Slurm may warn half a minute early: not before there are ranks that can be deaf.
    limit = ["cluster.time_limit=2", "cluster.stop_before_limit_s=50", "cluster.max_requeues=0"]
    deaf = submit("deaf", limit, ["train.steps=2000", "plan.step_s=1", "checkpoint.every=1000", "plan.deaf=1"])
    crash = submit("crash", ["cluster.max_requeues=1"], ["plan.crash_at=2", "plan.step_s=0.1"])
    stuck = submit("stuck", ["cluster.max_requeues=1"], ["plan.train_exit=1"])
    never = submit("never", ["cluster.max_requeues=0"], ["plan.train_exit=1"])
    wrong = submit("wrong", [], ["plan.train_exit=2"])
    wrong_server = submit("wrong_server", [], ["plan.serve_exit=2"])
    cancelled = submit("cancelled", [], ["train.steps=1000"])
    cancelled.wait_steps(1)
    slurm.run(["scancel", str(cancelled.id)])
    slurm.assert_nothing_left()
    for job in (stuck, never, wrong, wrong_server, deaf):
        assert job.wait_end() == "FAILED", job.log
    assert cancelled.wait_end() == "CANCELLED"
    assert crash.wait_end() == "COMPLETED"
    assert crash.steps == [1, 2, 3, 4, 5, 6], "the attempt that crashed had saved step 2"
    assert stuck.log.count("requeueing;") == 1
    assert "giving up: 1 requeues in a row brought no checkpoint after step 0" in stuck.log
    assert "not requeueing: MAX_REQUEUES is 0" in never.log
    assert "the time limit is near" in deaf.log
    assert "the trainer has not stopped in time" in deaf.log
    for job in (wrong, wrong_server, cancelled, never, deaf):
        assert len(job.attempts) <= 1
        assert "requeueing;" not in job.log
    assert (wrong_server.job.run_dir / "job" / "exit_code").read_text() == "2\n"


def test_the_node_of_the_batch_script_is_lost(submit, slurm: ThrowawaySlurm) -> None:
    """Nobody is left to requeue the job: Slurm does, and the job counts it and goes on elsewhere."""
    job = submit("lost", [], ["train.steps=12", "plan.step_s=0.5"])
    job.wait_steps(3)
    lost = job.attempts[0]["nodes"]
    slurm.power_off(lost)
    try:
        wait_for(lambda: len(job.attempts) == 2, "second attempt")
        assert job.attempts[1]["nodes"] != lost
        assert job.wait_end() == "COMPLETED"
    finally:
        slurm.power_on(lost)
    assert sorted(set(job.steps)) == list(range(1, 13))
    assert len(job.steps) <= 13, "only what came after the last checkpoint, of every second step, is done twice"
    wait_for(lambda: set(slurm.node_states().values()) == {"IDLE"}, "return of the node")


def test_the_submit_command_follows_a_job(
    slurm: ThrowawaySlurm,
    venv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    spec = importlib.util.spec_from_file_location("slurm_submit_command", ROOT / "slurm" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    run = ["experiment=quickstart", "checkpoint.every=2", "run_name=mine", "--no-preflight", "cluster=cpu"]
    run += [f"cluster.venv={venv}", "cluster.max_requeues=1"]

    assert submit.main([*run, "train.steps=3", "--wait"]) == 0
    first = capsys.readouterr().out
    for line in ("RUNNING on 127.0.1.", "the trainer has ended, exit code 0", "COMPLETED", "ended with exit code 0"):
        assert line in first
    assert submit.main([*run, "train.steps=500"]) == 0
    assert submit.main([*run, "train.steps=4"]) == 2, "two jobs on one run"
    assert "run_name must be of a run that no job works on, got 'mine': job" in capsys.readouterr().err
    slurm.run(["scancel", (tmp_path / "outputs/quickstart/mine/job/job_id").read_text().strip()])
    slurm.assert_nothing_left()

    plan = "+cluster.environment.PLAN='plan.train_exit=7'"
    assert submit.main([*run, "train.steps=500", plan, "--wait"]) == 7, "the job's result"
    failed = capsys.readouterr().out
    assert "requeued 1 times" in failed
    assert "giving up" in failed
    assert submit.main([*run, "cluster.partition=nowhere"]) == 1
    assert "nvalid partition" in capsys.readouterr().err
    slurm.assert_nothing_left()
