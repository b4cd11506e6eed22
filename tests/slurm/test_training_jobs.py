"""Real trainings on a real Slurm, submitted as a user does; what takes their nodes away, and that they end as
undisturbed ones do."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.recording import FOLDER, read_batch, step_file
from tests.conftest import RealServer
from tests.e2e.runs import assert_servers_agree
from tests.slurm.throwaway import NODES, ThrowawaySlurm, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS, PROMPTS = 16, 2
PATIENCE_S = 900.0
pytestmark = [pytest.mark.slurm, pytest.mark.server, pytest.mark.timeout(1200)]


class Training:
    """``slurm/submit.py ... --wait`` in the background."""

    def __init__(self, slurm: ThrowawaySlurm, overrides: list[str], *, run_dir: Path, cwd: Path) -> None:
        self.slurm, self.run_dir = slurm, run_dir
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "slurm" / "submit.py"), *overrides, "--wait"],
            cwd=cwd,
            env={**slurm.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def job_id(self) -> str:
        return (self.run_dir / "job" / "job_id").read_text().strip()

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def attempts(self) -> int:
        return self.output.count(", attempt ")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, what, patience_s=PATIENCE_S)
        assert self.process.poll() is None, self.output

    def wait_rows(self, number: int) -> None:
        self.wait(lambda: len(self.rows) >= number, f"{number} steps\n{self.output}")

    def wait_end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


@pytest.fixture
def submit(slurm: ThrowawaySlurm, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Submits a training of two ranks on two nodes; whatever becomes of the test, nobody follows it afterwards."""
    submitted: list[Training] = []

    def submit(name: str, model: Path, *more: str) -> Training:
        overrides = [
            *("experiment=quickstart", "warm_start.enabled=false"),
            *(f"model.path={model}", "parallel.tp=2", "data.max_prompt_tokens=256", "data.val_size=4"),
            *(f"rollout.prompts_per_step={PROMPTS}", "rollout.group_size=4", "rollout.concurrency=8"),
            *("rollout.record=true", "eval.every=0", "eval.at_start=false", f"train.steps={STEPS}"),
            *("train.save_hf=false", "logging.console=plain", "checkpoint.every=1", "output_dir=runs"),
            *(f"run_name={name}", "cluster=cpu", "cluster.trainer_nodes=2", "cluster.ranks_per_node=1"),
            *("cluster.stop_before_limit_s=600", "--no-preflight", *more),
        ]
        submitted.append(Training(slurm, overrides, run_dir=tmp_path / "runs" / "quickstart" / name, cwd=tmp_path))
        return submitted[-1]

    yield submit
    for training in submitted:
        training.process.kill()
        training.process.wait()
    slurm.run(["scancel", "--user", getpass.getuser()], check=False)


def assert_same_end(training: Training, slurm: ThrowawaySlurm) -> None:
    """All that an undisturbed run leaves: every step once, of every problem in turn, and nothing that still runs."""
    assert training.wait_end() == 0, training.output
    slurm.assert_nothing_left()
    rows = training.rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "every step stands there once"
    assert [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))
    assert_servers_agree(rows)
    recorded = (read_batch(step_file(training.run_dir / FOLDER, step)) for step in range(1, STEPS + 1))
    drawn = [group.index for batch in recorded for group in batch.groups]
    assert drawn == list(range(STEPS * PROMPTS)), "no problem is lost, none trained on twice"
    status = json.loads((training.run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", STEPS)
    assert "giving up" not in training.output


def test_a_node_is_lost(
    submit: Callable[..., Training],
    slurm: ThrowawaySlurm,
    tiny_qwen3: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """One of the trainer's, of a heterogeneous job with an SGLang server on the third."""
    limits = ["rollout.server.max_total_tokens=2048", "rollout.server.max_running_requests=16"]
    training = submit("robbed", tiny_qwen3, *limits)
    training.wait_rows(2)
    lost = time.monotonic()
    slurm.power_off(NODES[1])
    before = len(training.rows)
    slurm.power_on(NODES[1])
    training.wait(lambda: training.attempts() >= 2, "second attempt")
    again = time.monotonic()
    training.wait_rows(before + 1)
    seconds = time.monotonic() - lost
    record_property("node_loss_to_next_step_s", seconds)
    print(
        f"from the loss of a node to the next attempt {again - lost:.0f} s, to the next training step {seconds:.0f} s"
    )
    assert_same_end(training, slurm)


def test_told_to_stop_and_preempted(
    submit: Callable[..., Training], slurm: ThrowawaySlurm, real_server: RealServer
) -> None:
    """With a server that is nobody's job."""
    limits = ["rollout.server.max_total_tokens=null", "rollout.server.max_running_requests=null"]
    engine = HttpEngine(real_server.url, num_ranks=real_server.info.num_ranks, timeout_s=60)
    try:
        given = [f"rollout.urls=[{real_server.url}]", "cluster.server_nodes=0", *limits]
        training = submit("stopped", real_server.model, *given)
        training.wait_rows(1)
        slurm.run(["scancel", "--batch", "--signal=USR1", training.job_id])
        training.wait(lambda: training.attempts() >= 2, "second attempt")
        training.wait_rows(len(training.rows) + 1)
        urgent = ["--partition=high", "--exclusive", f"--nodelist={NODES[0]}", "--output=/dev/null", "--wrap=true"]
        slurm.run(["sbatch", *urgent])
        training.wait(lambda: training.attempts() >= 3, "third attempt")
        assert_same_end(training, slurm)
    finally:
        engine.update_from_disk(str(real_server.model), weight_version=0)
    assert "USR1: the time limit is near" in training.output
    assert "TERM: preempted or cancelled" in training.output
    for asked in ("SIGUSR1", "SIGTERM"):
        assert re.search(rf"stopped by {asked}( at rank \d)?; saved at step \d+", training.output), training.output
