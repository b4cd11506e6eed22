"""The state beside the weights: exact through a file, harmless from a stranger, refused by another configuration."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rlvr.config.compose import load_config
from megatron_rlvr.trainer.checkpoints.run_state import STATE_FILE, Progress, RunState, compare_configs, plain_config
from tests.e2e.recorded import group

CONFIG = ["experiment=quickstart"]


def state(**changes: Any) -> RunState:
    rng = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": np.arange(9, dtype=np.uint8)}
    values: dict[str, Any] = {
        "progress": Progress(step=7, accuracy=0.25, unrecorded={"step": 7, "reward/mean": 0.5}),
        "policy_version": 7,
        "num_updates": 14,
        "rollouts": {"stream": {"epoch": 1, "position": 3}, "surplus": [group(5, 99, 4)], "acceptance": 0.5},
        "stateful": {"entropy": {"K": 0.4, "window": np.ones(3)}},
        "random": [rng],
        "layout": {"world_size": 1, "tp": 1},
        "config": plain_config(load_config(CONFIG)),
        "versions": {"torch": "2"},
    }
    return RunState(**values | changes)


def test_everything_comes_back(tmp_path: Path) -> None:
    before = state()
    (tmp_path / STATE_FILE).write_bytes(before.to_bytes())
    after = RunState.read(tmp_path)
    assert after.progress == before.progress
    assert after.config == before.config
    assert after.num_updates == 14
    [ours], [theirs] = before.rollouts["surplus"], after.rollouts["surplus"]
    assert theirs.prompt.uid == ours.prompt.uid
    for a, b in zip(ours.rollouts, theirs.rollouts, strict=True):
        assert np.array_equal(a.rollout_logprobs, b.rollout_logprobs)
        assert a.finish_reason is b.finish_reason
    assert np.array_equal(after.stateful["entropy"]["window"], np.ones(3))
    np.random.set_state(after.random[0]["numpy"])
    random.setstate(after.random[0]["python"])


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch evil",)


def test_a_strangers_state_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(pickle.dumps({"format": 1, "stateful": Evil()}))
    with pytest.raises(ValueError, match=r"system has no place"):
        RunState.read(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(pickle.dumps({"format": 99}))
    with pytest.raises(ValueError, match="must be of format 1, got 99"):
        RunState.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("rollout.group_size=16", "rollout.group_size must be 8"),
        ("data.train_size=2000", "data.train_size must be 2500"),
        ("train.seed=1", "train.seed must be 0"),
        ("loss=kl_cov", "loss.name must be 'ppo'"),
        ("model.scratch.hidden_size=128", "model.scratch.hidden_size must be 256"),
        ("data.reasoning_gym=[{name: countdown}]", "data.reasoning_gym must be"),
        ("model.dtype=bf16", "model.dtype must be 'fp32'"),
    ],
)
def test_what_cannot_continue_is_refused(change: str, field: str) -> None:
    saved = plain_config(load_config(CONFIG))
    with pytest.raises(ValueError, match=field):
        compare_configs(saved, load_config([*CONFIG, change]), origin=Path("step_000002"))


def test_what_may_change() -> None:
    saved = plain_config(load_config(CONFIG))
    free = ["parallel.tp=4", "train.steps=999", "logging.wandb=true", "eval.every=1", "run_name=x", "sync.bucket_mb=1"]
    assert compare_configs(saved, load_config([*CONFIG, *free]), origin=Path("x")) == []
    [note] = compare_configs(saved, load_config([*CONFIG, "optim.lr=1e-5"]), origin=Path("x"))
    assert note == "optim.lr was 0.0002 and is 1e-05 from here on"


def test_bad_updates_are_counted_in_a_row() -> None:
    progress = Progress()
    for skipped, count in [([True], 1), ([True, True], 3), ([False], 0), ([True, False, True], 1)]:
        progress.count_bad_updates(skipped)
        assert progress.bad_updates == count
