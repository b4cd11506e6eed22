"""A run that is killed and resumed equals the one that was left alone, whatever it was doing; without servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.report.run_status import read_status
from megatron_rlvr.trainer.checkpoints.folder import CheckpointFolder
from megatron_rlvr.trainer.evaluation.model import find_model
from tests.distributed.ranks import end_of_ranks
from tests.e2e.recorded import GROUP, PROMPTS, record
from tests.paths import python_path

SCRIPT = Path(__file__).with_name("interrupted_rank.py")
STEPS = 6
VOCAB = 259
# Interrupted in the middle of a schedule and of a controller's way.
STEERED = [
    *("advantage.K_schedule.kind=cosine", "advantage.K_schedule.end=0.7", f"advantage.K_schedule.last_step={STEPS}"),
    *("advantage.gate_memory=0.5", "loss.mismatch.weight=token", "controller.target_entropy=20", "controller.rho=0.5"),
    "controller.actuators=[{name: eps_high, low: 0.2, high: 0.4, gain: 0.01, max_step: 0.02}]",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A named run, started as often as a test likes."""

    folder: Path
    overrides: list[str]
    world_size: int = 2

    def start(self, *more: str, **accident: Any) -> list[tuple[int | None, str]]:
        arguments = [json.dumps(accident), *self.overrides, *more]
        return end_of_ranks(SCRIPT, arguments, world_size=self.world_size, timeout_s=120)

    def launch(self, **accident: Any) -> subprocess.CompletedProcess[str]:
        """Through the launcher, as a user would."""
        launcher = [sys.executable, "-m", "megatron_rlvr.launch", "--standalone", "--nproc-per-node", "2"]
        return subprocess.run(
            [*launcher, str(SCRIPT), json.dumps(accident), *self.overrides],
            env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Metrics without times."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if "time/" not in key and key != "tokens_per_s"}
            for line in lines
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")

    def checkpoints(self) -> list[int]:
        return CheckpointFolder(self.folder / "checkpoints").steps()

    def status(self) -> dict[str, Any]:
        status = read_status(self.folder)
        assert status is not None
        return status


def overrides(model: Path, recorded: Path, out: Path, name: str) -> list[str]:
    return [
        *("experiment=quickstart", "warm_start.enabled=false"),
        *(f"model.path={model}", "parallel.tp=1", "rollout=replay", f"rollout.replay_from={recorded}"),
        *(f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", "data.max_prompt_tokens=64"),
        *(f"train.steps={STEPS}", "train.updates_per_rollout=2", "optim.lr=1e-2", "optim.schedule=linear"),
        *("eval.every=2", "eval.at_start=true", "logging.console=plain", f"output_dir={out}", f"run_name={name}"),
        *("checkpoint.every=2", "checkpoint.keep_last=2", "diagnostics.every=2", "diagnostics.probe_responses=8"),
        *STEERED,
    ]


def trial(model: Path, recorded: Path, out: Path, name: str, **more: Any) -> Trial:
    return Trial(folder=out / "quickstart" / name, overrides=overrides(model, recorded, out, name), **more)


def codes(ends: Sequence[tuple[int | None, str]]) -> list[int | None]:
    return [code for code, _ in ends]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "rollouts", steps=STEPS, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def whole(tiny_qwen3: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The run that nothing happens to."""
    run = trial(tiny_qwen3, recorded, tmp_path_factory.mktemp("whole"), "whole")
    ends = run.start("checkpoint.keep_every=6", "checkpoint.keep_best=true", "checkpoint.export_hf_every=4")
    assert codes(ends) == [0, 0], ends
    return run


def test_the_run_that_is_left_alone(whole: Trial, tiny_qwen3: Path, tmp_path: Path) -> None:
    assert [row["step"] for row in whole.rows()] == [1, 2, 3, 4, 5, 6]
    assert whole.status() == {
        "state": "finished",
        "step": 6,
        "checkpoint": "step_000006",
        "exit_code": 0,
        "reason": None,
    }
    accuracy = {row["step"]: row["eval/accuracy"] for row in whole.rows() if row.get("eval/accuracy") is not None}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert set(whole.checkpoints()) == {4, 6, best}
    times = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/checkpoint_s"] > 0 for row in times)
    saved = whole.folder / "checkpoints" / "step_000006"
    # As `python -m megatron_rlvr.evaluate model.path=<checkpoint>` takes it.
    evaluated = find_model(str(saved), converted=tmp_path, on_convert=lambda line: None)
    assert_same(load_file(evaluated.path / "model.safetensors"), whole.weights())
    assert Tokenizer.load(evaluated.path).decode([65, 66]) == Tokenizer.load(tiny_qwen3).decode([65, 66])
    assert evaluated.name == "quickstart-whole-step_000006"
    assert not torch.equal(
        whole.weights()["model.norm.weight"], load_file(tiny_qwen3 / "model.safetensors")["model.norm.weight"]
    )
    exported = load_file(whole.folder / "export" / "step_000004" / "model.safetensors")
    assert not torch.equal(exported["model.norm.weight"], whole.weights()["model.norm.weight"])


def test_the_instruments_saw_every_step(whole: Trial) -> None:
    """What the monitors say belongs to the rows that a resumed run has to repeat."""
    rows = whole.rows()
    assert ["dynamics/p4" in row for row in rows] == [False, True] * 3
    assert ["dynamics/m2" in row for row in rows] == [False] + [True] * 5
    assert rows[-1]["agreement/p4_m1/num_steps"] == 3
    assert rows[-1]["agreement/p1_m2/num_steps"] == 5
    # Evaluated before the first step and after every second one.
    assert [row.get("law/num_points") for row in rows] == [None, None, None, 3, None, 4]
    assert rows[-1]["law/early_rmse"] == abs(rows[-1]["law/early_error"])
    levels = [row["advantage/K"] for row in rows]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0.4, 0.7)
    assert len(set(levels)) == STEPS
    clips = [row["controller/value/eps_high"] for row in rows]
    assert clips[0] == 0.28
    assert clips == sorted(clips)
    assert len(set(clips)) == STEPS
    kept = sorted(path.name for path in (whole.folder / "samples").glob("tokens_*.json"))
    assert kept == [f"tokens_{step:06d}.json" for step in (2, 4, 6)]


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_killed_again_and_again(whole: Trial, tiny_qwen3: Path, recorded: Path, tmp_path: Path) -> None:
    """At every moment once; each start goes on from what is sound, and the end is the same bit by bit."""
    run = trial(tiny_qwen3, recorded, tmp_path, "killed")
    # In an update, before there is any checkpoint: the next start is from the beginning.
    ends = run.start(signal="SIGKILL", at="update", step=2, rank=1)
    assert codes(ends)[1] == -signal.SIGKILL
    assert codes(ends)[0] == 1, "the other rank ends by itself"
    assert [row["step"] for row in run.rows()] == [1]
    assert run.checkpoints() == []
    # While step 4's checkpoint is written.
    ends = run.start(signal="SIGKILL", at="write", step=4)
    assert codes(ends)[0] == -signal.SIGKILL, ends
    assert run.checkpoints() == [2]
    assert (run.folder / "checkpoints" / ".step_000004.incomplete").is_dir()
    assert run.status()["state"] == "running", "nobody could say anything else"
    # A request to stop in an evaluation: what was trained is saved, the evaluation is made up for.
    ends = run.start(signal="SIGUSR1", at="evaluation", step=4)
    assert codes(ends) == [75, 75], ends
    assert "step_000004.incomplete was not written to the end" in ends[0][1]
    assert "going on after step 2" in ends[0][1]
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
    assert run.status()["step"] == 4
    # At one rank, in an update: the step is finished, everything is saved.
    ends = run.start(signal="SIGTERM", at="update", step=5, rank=1)
    assert codes(ends) == [75, 75], ends
    assert "going on after step 4" in ends[0][1]
    assert run.status() | {"reason": None} == {
        "state": "stopped",
        "step": 5,
        "checkpoint": "step_000005",
        "exit_code": 75,
        "reason": None,
    }
    assert "SIGTERM" in run.status()["reason"]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5]
    # A shard that lost its end: named, and the checkpoint before it is taken.
    shard = run.folder / "checkpoints" / "step_000005" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    ends = run.start(signal="SIGUSR1", at="step", step=5)
    assert codes(ends) == [75, 75], ends
    assert "__0_0.distcp has" in ends[0][1]
    assert "going on after step 4" in ends[0][1]
    assert run.status()["checkpoint"] == "step_000005"
    # One that holds another byte than was written, in a file so big that the ranks share the reading.
    shard = run.folder / "checkpoints" / "step_000005" / "__0_0.distcp"
    turned = bytearray(shard.read_bytes())
    turned[len(turned) // 2] ^= 1
    shard.write_bytes(turned)
    ends = run.start(small_bytes=0)
    assert codes(ends) == [0, 0], ends
    assert "__0_0.distcp does not hold what was written" in ends[0][1]
    assert "going on after step 4" in ends[0][1]
    assert run.rows() == whole.rows()
    assert_same(run.weights(), whole.weights())
    assert run.checkpoints() == [5, 6], "the newest two are kept"
    assert not list(run.folder.glob("checkpoints/.*"))
    assert run.status()["state"] == "finished"


def test_other_layout_more_steps_and_what_is_refused(
    whole: Trial, tiny_qwen3: Path, recorded: Path, tmp_path: Path
) -> None:
    run = trial(tiny_qwen3, recorded, tmp_path, "moved")
    # The launcher is killed: its ranks save and end, by the time that their output does.
    launched = run.launch(signal="SIGKILL", at="step", step=3, to_launcher=True)
    assert launched.returncode == -signal.SIGKILL, launched.stdout
    assert "stopped by the end of its launcher" in launched.stdout
    assert "run_name=moved goes on from there" in launched.stdout
    assert "Traceback" not in launched.stdout
    for change, words in {
        "rollout.group_size=2": ["rollout.group_size", "4", "2"],
        "data.seed=3": ["data.seed", "0", "3"],
        "checkpoint.resume=never": ["checkpoint.resume", "never"],
    }.items():
        ends = run.start(change)
        assert codes(ends)[0] == 2, ends
        assert all(word in ends[0][1] for word in words), ends[0][1]
        assert "Traceback" not in ends[0][1]
    assert [row["step"] for row in run.rows()] == [1, 2, 3], "a refused start changes nothing"
    ends = run.start("parallel.tp=2", "logging.samples_per_step=1", "optim.weight_decay=0.1")
    assert codes(ends) == [0, 0], ends
    assert "optim.weight_decay was 0.0 and is 0.1" in ends[0][1]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6]
    assert run.rows()[:3] == whole.rows()[:3]


def test_full_disk(whole: Trial, tiny_qwen3: Path, recorded: Path, tmp_path: Path) -> None:
    """A checkpoint that does not fit costs itself alone."""
    run = trial(tiny_qwen3, recorded, tmp_path, "full")
    ends = run.start(file_limit=200_000, step=4)
    assert codes(ends) == [0, 0], ends
    assert "rank 0: OSError: [Errno 27] File too large" in ends[0][1]
    assert "training goes on, the newest is of step 2" in ends[0][1]
    assert run.checkpoints() == [2, 6]
    assert not list(run.folder.glob("checkpoints/.*"))
    rows = run.rows()
    assert [row.pop("checkpoint/failures") for row in rows] == [0, 0, 0, 1, 1, 1]
    assert rows == [{k: v for k, v in row.items() if k != "checkpoint/failures"} for row in whole.rows()]


def test_what_is_not_finite(tiny_qwen3: Path, recorded: Path, tmp_path: Path) -> None:
    """Such updates are skipped and counted; one goes by, two in a row end the run with the reason."""
    run = trial(tiny_qwen3, recorded, tmp_path, "bad")
    single = ["train.updates_per_rollout=1", "train.max_bad_updates=2", "controller.target_entropy=null"]
    single += ["controller.actuators=[]", "controller.rho=0.1"]  # a loss by path has no upper clip to steer
    ends = run.start(*single, "loss.name=tests.e2e.holed_losses:ppo_with_holes")
    assert codes(ends) == [1, 1], ends
    assert "2 updates in a row, up to step 5" in ends[0][1]
    assert "Traceback" not in ends[0][1]
    rows = run.rows()
    assert [row["optim/skipped_updates"] for row in rows] == [0, 1, 0, 1, 1]
    assert [row["loss/policy"] is None for row in rows] == [False, True, False, False, True]
    assert run.status()["state"] == "failed"
    assert "2 updates in a row" in run.status()["reason"]
    assert CheckpointFolder(run.folder / "checkpoints").newest({})[0] is not None, "the last one is sound"
    # Weights that grow beyond all bounds: the forward pass itself is not finite any more.
    run = trial(tiny_qwen3, recorded, tmp_path, "exploded")
    ends = run.start(*single, "optim.lr=1e30", "optim.warmup_steps=0", "parallel.tp=2", "checkpoint.every=0")
    assert codes(ends) == [1, 1], ends
    assert "2 updates in a row, up to step 3" in ends[0][1]
    assert [row["optim/skipped_updates"] for row in run.rows()] == [0, 1, 1]
