"""Short trainings on real parts: Megatron ranks, an SGLang server, weight syncs, and everything a run leaves behind."""

from __future__ import annotations

import json
import math
import signal
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlvr.rollout.engine import HttpEngine
from tests.conftest import RealServer
from tests.e2e.runs import assert_servers_agree, outliving, start, train

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
    "diagnostics.every=2",
    "diagnostics.probe_responses=8",
    "logging.console=plain",
]
OF_ENGINE_LOGPROBS = (
    "time/",
    "rollout/logprob_diff",
    "dynamics/p1/",
    "dynamics/p2",
    "agreement/p2_",
    "safety/",
    "sync/logprob_diff",
    "mismatch/",
    "entropy/sampled_mean",
)
"""Beginnings of metrics that tell seconds, or are computed from the engine's own log-probs, whose last bits depend on
what it serves together."""
SETS = [
    "eval.every=2",
    "eval.sets=[{name: sums, reasoning_gym: [{name: chain_sum, params: {max_terms: 3, max_digits: 1}}], size: 3, "
    "num_samples: 4, temperature: 1.0, greedy: true, k: [1, 2], max_response_tokens: 4}]",
]
METRICS = {
    *("step", "policy_version", "reward/mean", "reward/max", "entropy/mean", "advantage/zero_fraction", "cov/mean"),
    *("loss/policy", "grad_norm", "rollout/logprob_diff_mean", "rollout/logprob_diff_max", "response/length_mean"),
    *("time/rollout_s", "time/train_s", "time/sync_s", "tokens_per_s"),
}


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "latest" / "metrics.jsonl").read_text().splitlines()]


# What steers a run, beside what it runs on.
COURSE = [
    *("advantage.K_schedule.kind=two_phase", "advantage.K_schedule.end=3/5", "advantage.K_schedule.switch_step=3"),
    *("advantage.gate_memory=0.5", "loss.mismatch.weight=token", "loss.mismatch.reject=geometric"),
]
CONTROLLED = [
    *("loss=kl_cov", "train.updates_per_rollout=2", "loss.kl_cov.ratio=0.2", "loss.kl_cov.skip_zero_advantage=true"),
    *("loss.cov_mass=0.9", "controller.target_entropy=20", "controller.rho=1"),
    "controller.actuators=[{name: K, low: 0.2, high: 0.8, gain: 0.1, max_step: 0.1},"
    "{name: kl_cov, low: 0.1, high: 0.25, gain: 1, max_step: 1}]",
]


COLOCATED = ["sync.transport=colocated", "sync.release_memory=true"]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true", *SETS, *COURSE, *COLOCATED]),
        (2, ["parallel.tp=1", "parallel.pp=2", "sync.transport=shards", *CONTROLLED]),
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
    assert_servers_agree(rows)
    assert_looked_at(rows, out)
    if "loss=kl_cov" in overrides:
        # Unknown where a whole step's advantages are zero: then no covariance is positive and nothing is selected.
        assert all(0 < (row["cov/selected_overlap_current"] or 1) <= 1 for row in rows)
        check_controlled(rows)
    if COURSE[0] in overrides:
        check_course(rows)
        assert "responses with zero advantage stay out of the update" in run.output
    if SETS[0] in overrides:
        check_sets(out / "latest", rows)
    entropies = {round(row["entropy/mean"], 9) for row in rows}
    assert len(entropies) == 3, "the policy moves"
    assert f"(SGLang {metadata.version('sglang')})" in run.output
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


def assert_looked_at(rows: list[dict[str, Any]], out: Path) -> None:
    """The second step was measured in detail; its predictions meet the third one's entropy."""
    costly = {"dynamics/p3", "dynamics/p4", "dynamics/m1"}
    assert [costly <= row.keys() for row in rows] == [False, True, False]
    assert all(math.isfinite(rows[1][name]) for name in costly)
    assert rows[2]["dynamics/m2"] == pytest.approx(rows[2]["entropy/mean"] - rows[1]["entropy/mean"])
    assert rows[2]["agreement/p4_m2/num_steps"] == 1
    assert rows[1]["time/diagnostics_s"] > rows[2]["time/diagnostics_s"]
    kept = json.loads((out / "latest" / "samples" / "tokens_000002.json").read_text())
    assert kept["responses"]
    for response in kept["responses"]:
        assert len(response["pieces"]) == len(response["logprobs"]) == response["num_tokens"]
    page = (out / "latest" / "report.html").read_text()
    for view in ("Entropy dynamics", "Covariance", "Regimes, K and control", "Tokens of step 2"):
        assert f"<h2>{view}</h2>" in page


def check_course(rows: list[dict[str, Any]]) -> None:
    assert [row["advantage/K"] for row in rows] == [0.4, 0.4, 0.6]
    # Unknown where all of a step's responses are left out.
    assert all(0.99 < (row["mismatch/weight_mean"] or 1) < 1.01 for row in rows)
    assert all(not row["mismatch/rejected_fraction"] for row in rows)
    assert all(0 < row["update/tokens_probed"] <= row["update/tokens_saved"] for row in rows)


def check_controlled(rows: list[dict[str, Any]]) -> None:
    """The set-point is out of reach: KL-Cov goes to its bound in one step and waits there for one; K is next."""
    assert [row["controller/value/kl_cov"] for row in rows] == [0.2, 0.25, 0.25]
    assert [row["controller/active"] for row in rows] == [-1, 0, 0]
    assert rows[2]["controller/entropy_ema"] == rows[1]["entropy/mean"]


def check_sets(run: Path, rows: list[dict[str, Any]]) -> None:
    """The set was evaluated before training and after steps 2 and 3; its numbers follow from the kept answers."""
    for step, row, prefix in ((0, rows[0], "start_"), (2, rows[1], ""), (3, rows[2], "")):
        kept = [json.loads(line) for line in (run / "eval" / "sums" / f"step_{step:06d}.jsonl").open()]
        sampled = [record["samples"] for record in kept if record["mode"] == "sampled"]
        assert [len(samples) for samples in sampled] == [4, 4, 4]
        assert all(1 <= sample["length"] <= 4 for samples in sampled for sample in samples)
        right = [sum(sample["correct"] for sample in samples) / 4 for samples in sampled]
        assert row[f"eval/sums/{prefix}pass@1"] == pytest.approx(sum(right) / 3)
        greedy = [record["samples"][0]["correct"] for record in kept if record["mode"] == "greedy"]
        assert row[f"eval/sums/{prefix}greedy"] == pytest.approx(sum(greedy) / 3)
        assert row["eval/sums/num_problems"] == 3
        held_out = [json.loads(line) for line in (run / "eval" / "held_out" / f"step_{step:06d}.jsonl").open()]
        accuracy = sum(record["samples"][0]["correct"] for record in held_out) / 16
        assert row[f"eval/{prefix}accuracy"] == pytest.approx(accuracy)
    assert "eval/sums/pass@1" not in rows[0], "steps without an evaluation have no numbers of one"


def same_in_every_run(row: dict[str, Any]) -> dict[str, Any]:
    """Metrics that follow from the seed: all but times, and what two floating-point paths differ by."""
    return {
        name: value
        for name, value in row.items()
        if not name.startswith(OF_ENGINE_LOGPROBS) and not name.endswith(("_per_s", "cached_tokens", "retries"))
    }


def test_given_server_and_the_same_seed_again(real_server: RealServer, tmp_path: Path) -> None:
    """Two ranks train on a server that somebody else runs; a second run with the same seed is the same run."""
    engine = HttpEngine(real_server.url, num_ranks=real_server.info.num_ranks, timeout_s=60)
    overrides = [
        *("experiment=quickstart", "model.scratch=null", "warm_start.enabled=false", "warm_start.check_every=50"),
        *(f"model.path={real_server.model}", f"rollout.urls=[{real_server.url}]", "data.max_prompt_tokens=256"),
        *("data.val_size=8", "rollout.prompts_per_step=2", "rollout.group_size=4", "train.steps=2"),
        # One at a time: what a batch holds decides the last bits of its logits, and these, rarely, a token.
        *("rollout.concurrency=1", "rollout.max_response_tokens=16", "logging.console=plain", "optim.lr=1e-3"),
        # Every response its own reward, by its text: there is something to learn from random weights.
        *("reward.verifier=tests.e2e.rewards:share_of_low_bytes", "reward.binary=false", "advantage=grpo"),
    ]
    models = []
    rows = []
    try:
        for name in ("once", "again"):
            run = train([*overrides, f"output_dir={tmp_path / name}"], ranks=2, timeout_s=300)
            assert run.code == 0, run.output
            assert run.survivors == []
            assert "rollout.urls takes the place" in run.output
            assert engine.weight_version() == "2", "the server runs on under the last version"
            rows.append(rows_of(tmp_path / name))
            models.append((tmp_path / name / "latest" / "model" / "model.safetensors").read_bytes())
            engine.update_from_disk(str(real_server.model), weight_version=0)
    finally:
        engine.update_from_disk(str(real_server.model), weight_version=0)
    assert_servers_agree(rows[0])
    assert all(row["grad_norm"] > 0 for row in rows[0])
    for once, again in zip(*rows, strict=True):
        different = {
            name: (value, again[name]) for name, value in same_in_every_run(once).items() if value != again[name]
        }
        assert different == {}
    assert models[0] == models[1], "bit for bit"


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
        survivors = outliving(mark)
        for survivor in survivors:
            survivor.kill()
    assert survivors == []
    assert rows_of(tmp_path)[0]["step"] == 1, "what was done is kept"
