"""A run on a real server: stopped by a signal, resumed, recorded, and replayed; and rollouts without training."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlvr.report.run_status import read_status
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.recording import read_batch, step_file
from tests.conftest import RealServer
from tests.e2e.runs import Finished, assert_servers_agree, outliving, start, train

pytestmark = pytest.mark.server

STEPS, PROMPTS = 4, 3


def length_is_even(response_text: str, prompt: Any) -> float:
    """A verdict that a random model gets now and then."""
    return float(len(response_text) % 2 == 0)


def overrides(server: RealServer, out: Path, name: str) -> list[str]:
    return [
        *("experiment=quickstart", "warm_start.enabled=false"),
        *(f"model.path={server.model}", "parallel.tp=1", "data.max_prompt_tokens=256", "data.val_size=4"),
        *(f"rollout.prompts_per_step={PROMPTS}", "rollout.group_size=4", f"train.steps={STEPS}", "eval.every=0"),
        *("eval.at_start=false", "reward.verifier=tests.e2e.test_resume_live:length_is_even", "advantage=grpo"),
        *("checkpoint.every=3", "logging.console=plain", f"output_dir={out}", f"run_name={name}", "optim.lr=1e-2"),
    ]


def live(server: RealServer) -> list[str]:
    options = ["rollout.server.max_total_tokens=null", "rollout.server.max_running_requests=null"]
    return [f"rollout.urls=[{server.url}]", "rollout.concurrency=8", "rollout.record=true", *options]


def stopped_after(line: str, arguments: list[str]) -> Finished:
    """A run that gets SIGUSR1 when it prints a line that begins like this."""
    process, mark = start(arguments)
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for text in process.stdout:
            lines.append(text)
            if text.startswith(line):
                process.send_signal(signal.SIGUSR1)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
        survivors = outliving(mark)
        for survivor in survivors:
            survivor.kill()
    return Finished(code=code, output="".join(lines), survivors=[str(survivor) for survivor in survivors])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_and_its_recording_trains_the_same_policy(
    real_server: RealServer, tmp_path: Path
) -> None:
    engine = HttpEngine(real_server.url, num_ranks=real_server.info.num_ranks, timeout_s=60)
    folder = tmp_path / "quickstart" / "live"
    arguments = [*overrides(real_server, tmp_path, "live"), *live(real_server)]
    try:
        first = stopped_after("step 1/", arguments)
        assert first.code == 75, first.output
        assert first.survivors == []
        status = read_status(folder)
        assert status is not None
        assert status["state"] == "stopped"
        done = status["step"]
        assert 1 <= done < STEPS
        assert status["checkpoint"] == f"step_{done:06d}"
        second = train(arguments, timeout_s=200)
        assert second.code == 0, second.output
        assert second.survivors == []
        assert f"going on after step {done}" in second.output
        assert engine.weight_version() == str(STEPS)
        # Servers got the weights of the checkpoint before the next rollouts: both sides agree on what was sampled.
        assert_servers_agree(rows(folder))
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
        # No problem is lost, none is trained on twice.
        drawn = [g.index for s in range(1, STEPS + 1) for g in read_batch(step_file(folder / "rollouts", s)).groups]
        assert drawn == list(range(STEPS * PROMPTS))

        replay = [*overrides(real_server, tmp_path, "replay"), "rollout=replay"]
        again = train([*replay, f"rollout.replay_from={folder / 'rollouts'}"], timeout_s=200)
        assert again.code == 0, again.output
        want, got = (load_file(tmp_path / "quickstart" / n / "model/model.safetensors") for n in ("live", "replay"))
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        names = ("reward/mean", "loss/policy", "grad_norm", "entropy/mean", "rollout/retries", "eval/accuracy")
        for mine, theirs in zip(rows(folder), rows(tmp_path / "quickstart" / "replay"), strict=True):
            assert {name: mine.get(name) for name in names} == {name: theirs.get(name) for name in names}
    finally:
        engine.update_from_disk(str(real_server.model), weight_version=0)


def test_rollouts_without_training(real_server: RealServer, tmp_path: Path) -> None:
    arguments = [*overrides(real_server, tmp_path, "only"), *live(real_server), "train.enabled=false"]
    run = train([*arguments, "train.steps=2", "checkpoint.every=1"], timeout_s=200)
    assert run.code == 0, run.output
    assert run.survivors == []
    more = train([*arguments, "train.steps=3"], timeout_s=200)
    assert more.code == 0, more.output
    folder = tmp_path / "quickstart" / "only"
    assert [(row["step"], row["policy_version"]) for row in rows(folder)] == [(1, 0), (2, 0), (3, 0)]
    assert all("grad_norm" not in row and row["reward/mean"] >= 0 for row in rows(folder))
    drawn = [g.index for step in (1, 2, 3) for g in read_batch(step_file(folder / "rollouts", step)).groups]
    assert drawn == list(range(3 * PROMPTS))
    assert not (folder / "model").exists()
