"""Short trainings on real parts: Megatron ranks, an SGLang server, weight syncs, and everything a run leaves behind."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlvr.rollout.engine import HttpEngine
from tests.conftest import RealServer
from tests.e2e.runs import family, start, train

pytestmark = pytest.mark.server

SMALL = [
    "experiment=quickstart",
    "model.scratch.hidden_size=64",
    "model.scratch.intermediate_size=128",
    "model.scratch.num_layers=4",
    "model.scratch.num_heads=4",
    "model.scratch.num_kv_heads=2",
    "model.scratch.head_dim=16",
    "data.val_size=16",
    "warm_start.max_steps=4",
    "warm_start.check_every=4",
    "warm_start.check_problems=8",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "train.steps=3",
    "optim.lr=3e-3",
    "logging.console=plain",
]
METRICS = {
    *("step", "policy_version", "reward/mean", "reward/max", "entropy/mean", "advantage/zero_fraction", "cov/mean"),
    *("loss/policy", "grad_norm", "rollout/logprob_diff_mean", "rollout/logprob_diff_max", "response/length_mean"),
    *("time/rollout_s", "time/train_s", "time/sync_s", "tokens_per_s"),
}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "latest" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.tp=1", "parallel.pp=2", "loss=kl_cov", "train.updates_per_rollout=2", "loss.kl_cov.ratio=0.2"]),
        (2, ["parallel.tp=1", "sync.transport=disk", "loss=clip_cov", "loss.clip_cov.ratio=0.1", "loss.kl_coef=0.01"]),
    ],
    ids=["tensor parallel", "pipeline stages, kl_cov", "data parallel, disk, clip_cov, reference"],
)
def test_run(ranks: int, overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = train(
        [*SMALL, *overrides, f"output_dir={out}", f"warm_start.cache_dir={tmp_path / 'warm'}"],
        ranks=ranks,
        timeout_s=400,
    )
    assert run.code == 0, run.output
    assert run.survivors == []
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.keys() >= METRICS, METRICS - row.keys()
        assert all(math.isfinite(row[name]) for name in METRICS)
        assert row["policy_version"] == row["step"]
        # Step n is sampled from the weights of sync n - 1: both sides agree on them, before and after every sync.
        assert 0 < row["rollout/logprob_diff_max"] < 1e-4
    if "loss=kl_cov" in overrides:
        assert all(0 < row["cov/selected_overlap_current"] <= 1 for row in rows)
    entropies = {round(row["entropy/mean"], 9) for row in rows}
    assert len(entropies) == 3, "the policy moves"
    assert "held-out accuracy" in run.output
    assert "report.html" in run.output
    latest = out / "latest"
    page = (latest / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    config = yaml.safe_load((latest / "config.yaml").read_text())
    assert config["rollout"]["prompts_per_step"] == 4
    assert (latest / "model" / "model.safetensors").is_file()
    assert list((latest / "samples").iterdir())


def test_given_server(real_server: RealServer, tmp_path: Path) -> None:
    """Two ranks train on a server that somebody else runs, and leave it running under the last version."""
    engine = HttpEngine(real_server.url, num_ranks=real_server.info.num_ranks, timeout_s=60)
    overrides = [
        *("experiment=quickstart", "model.scratch=null", "warm_start.enabled=false", "warm_start.check_every=50"),
        *(f"model.path={real_server.model}", f"rollout.urls=[{real_server.url}]", "data.max_prompt_tokens=256"),
        *("data.val_size=8", "rollout.prompts_per_step=2", "rollout.group_size=4", "train.steps=2"),
        *("rollout.concurrency=8", "rollout.server.max_total_tokens=null", "rollout.server.max_running_requests=null"),
        *("logging.console=plain", f"output_dir={tmp_path}"),
    ]
    try:
        run = train(overrides, ranks=2, timeout_s=300)
        assert run.code == 0, run.output
        assert run.survivors == []
        assert engine.weight_version() == "2"
        rows = rows_of(tmp_path)
        assert all(0 < row["rollout/logprob_diff_max"] < 1e-4 for row in rows)
    finally:
        engine.update_from_disk(str(real_server.model), weight_version=0)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process, mark = start(
        [
            *SMALL,
            "parallel.tp=2",
            "train.steps=1000",
            f"output_dir={tmp_path}",
            f"warm_start.cache_dir={tmp_path}/warm",
        ],
        ranks=2,
    )
    training = threading.Event()
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 1/"):
                training.set()
        training.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert training.wait(300)
        assert process.poll() is None, "".join(lines)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        reader.join(30)
        survivors = list(family(mark))
        for survivor in survivors:
            survivor.kill()
    assert survivors == []
    assert rows_of(tmp_path)[0]["step"] == 1, "what was done is kept"
