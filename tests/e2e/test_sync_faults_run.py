"""A training of two ranks and two servers while weight syncs are disturbed in every way at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import assert_servers_agree, train

pytestmark = pytest.mark.server


def test_training_outlives_faults_of_its_syncs(tiny_qwen3: Path, tmp_path: Path) -> None:
    """A server dies, the other trainer rank stalls, a byte turns and SIGTERM comes, each in the middle of a sync."""
    overrides = [
        *("experiment=quickstart", "warm_start.enabled=false"),
        *(f"model.path={tiny_qwen3}", "data.max_prompt_tokens=256", "data.val_size=4", "eval.at_start=false"),
        *("rollout.server.num_servers=2", "rollout.server.max_total_tokens=4096", "rollout.prompts_per_step=2"),
        *("rollout.group_size=4", "train.steps=1000", "optim.lr=1e-3", "sync.timeout_s=60"),
        *("logging.console=plain", "train.save_hf=false", f"output_dir={tmp_path}"),
    ]
    run = train(overrides, ranks=2, timeout_s=500, module="tests.e2e.faulty_train")
    assert run.code == 75, run.output
    assert run.survivors == []
    status = json.loads((tmp_path / "latest" / "status.json").read_text())
    steps = status["step"]
    assert (status["state"], status["checkpoint"]) == ("stopped", f"step_{steps:06d}")
    assert f"stopped by SIGTERM at rank 0; saved at step {steps}" in run.output
    rows = [json.loads(line) for line in (tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["policy_version"]) for row in rows] == [(step, step) for step in range(1, steps + 1)]
    engines = [row["sync/engines"] for row in rows]
    assert engines[0] == 2
    lost = engines.index(1)
    assert rows[lost]["sync/attempts"] == 2, "the sync that lost a server went through with the other"
    assert sum(row["sync/attempts"] - 1 for row in rows) == 2, "and one was repeated for a byte"
    assert "out of routing" in run.output
    assert "holds other weights than were sent" in run.output
    # Both sides agree on the weights of every one of the syncs: what was sampled under them shows it.
    assert_servers_agree(rows)
    assert all(row["sync/logprob_diff"] < 1e-4 for row in rows)
    assert all(row["sync/verified"] > 0 for row in rows)
