"""What a preflight finds, in each of its subjects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr.config.compose import config_dir, load_config
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.rollout.ports import free_port
from megatron_rlvr.trainer.preflight.inspection import Place, num_parameters, preflight
from megatron_rlvr.trainer.preflight.report import PreflightReport, Row, Status
from megatron_rlvr.weights.hf_config import ModelShape

ROOT = Path(__file__).resolve().parents[3]
QWEN = config_dir() / "models" / "qwen3-8b-base.json"


def row(report: PreflightReport, subject: str) -> Row:
    [found] = [each for each in report.rows if each.subject == subject]
    return found


def quickstart(*overrides: str) -> RunConfig:
    return load_config(["experiment=quickstart", *overrides])


def with_model(model: Path, *overrides: str) -> RunConfig:
    return quickstart(
        *("model.scratch=null", f"model.path={model}", "warm_start.enabled=false", "warm_start.check_every=50"),
        *("parallel.tp=1", *overrides),
    )


def big(*overrides: str) -> RunConfig:
    return load_config(
        ["experiment=qwen3_8b_base_qae", "data.jsonl=[]", "data.reasoning_gym=[{name: gcd}]", *overrides]
    )


GPUS = Place(ranks_per_node=4, gpus_per_node=8, gpu_memory_gib=141.0)


def test_the_quickstart_is_ready() -> None:
    report = preflight(quickstart(), Place(ranks_per_node=2))
    assert report.ok, report.errors
    assert {each.subject for each in report.rows} >= {
        *("model", "configuration", "layout", "vocabulary", "sequence length", "tokenizer", "data", "servers"),
        *("memory of a trainer rank", "memory of a server rank", "disk", "ports", "packages"),
    }
    json.dumps(report.as_json())


def test_a_recipe_whose_model_is_elsewhere_is_judged_by_its_config() -> None:
    report = preflight(big(f"output_dir={ROOT}"), GPUS, model_config=QWEN)
    assert "8,190,735,360 parameters" in row(report, "model").finding
    assert row(report, "layout").status is Status.ok
    assert row(report, "tokenizer").status is Status.skipped
    [trainer] = report.memory["trainer"]
    per_rank = 8_190_735_360 / 4
    # Norms, which every tensor rank holds whole, are the rest.
    assert trainer["weights"] == pytest.approx(2 * per_rank, rel=1e-3)
    assert trainer["gradients"] == pytest.approx(4 * per_rank, rel=1e-3)
    assert trainer["optimizer"] == pytest.approx(12 * per_rank, rel=1e-3)
    assert report.memory["server"]["kv_per_token"] == 2 * 36 * 8 * 128 * 2
    missing = preflight(big(), GPUS)
    assert row(missing, "model").status is Status.error
    assert "--model-config" in row(missing, "model").advice


@pytest.mark.parametrize(
    ("overrides", "subject", "words"),
    [
        (["parallel.tp=3"], "layout", ["parallel.tp", "num_attention_heads (32)", "got 3"]),
        (["parallel.tp=1", "parallel.sequence_parallel=false", "parallel.pp=5"], "layout", ["num_hidden_layers (36)"]),
        (["parallel.ep=2"], "layout", ["parallel.ep", "dense"]),
        (["rollout.max_response_tokens=40000"], "layout", ["32768 positions", "42048"]),
        (["parallel.tp=8"], "layout", ["TP8", "not a multiple of 8"]),
        (["loss.dual_clip=0.5"], "configuration", ["dual_clip"]),
        (["rollout.server.base_gpu_id=2"], "servers", ["GPU 2", "the trainer's 4"]),
        (["rollout.server.num_servers=5"], "servers", ["8 of 8"]),
        (["rollout.urls=[http://127.0.0.1:PORT]"], "servers", ["127.0.0.1:PORT"]),
        (["rollout.server.host=203.0.113.1"], "ports", ["203.0.113.1"]),
        (["data.reasoning_gym=[{name: nosuch}]"], "data", ["nosuch"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_will_not_work_is_named(overrides: list[str], subject: str, words: list[str]) -> None:
    port = str(free_port("127.0.0.1"))
    report = preflight(big(*(text.replace("PORT", port) for text in overrides)), GPUS, model_config=QWEN)
    found = row(report, subject)
    assert found.status is Status.error, found
    for word in words:
        assert word.replace("PORT", port) in found.finding
    assert not report.ok


def test_a_full_gpu_names_the_options_that_help() -> None:
    place = Place(ranks_per_node=4, gpus_per_node=8, gpu_memory_gib=40.0)
    config = big("model.recompute=none", "parallel.sequence_parallel=false")
    found = row(preflight(config, place, model_config=QWEN), "memory of a trainer rank")
    assert found.status is Status.error
    for option in ("model.recompute=full", "parallel.sequence_parallel=true", "parallel.pp=2 on 8 ranks"):
        assert option in found.advice
    # What does not help is not said: there is one data-parallel rank.
    assert "distributed_optimizer" not in found.advice


def test_more_ranks_share_the_optimizer() -> None:
    def optimizer(ranks: int, *overrides: str) -> int:
        place = Place(nodes=ranks // 4, ranks_per_node=4, gpus_per_node=8, gpu_memory_gib=141.0)
        return preflight(big(*overrides), place, model_config=QWEN).memory["trainer"][0]["optimizer"]

    assert optimizer(16) == optimizer(4) // 4
    assert optimizer(16, "parallel.distributed_optimizer=false") == optimizer(4)


def test_a_server_must_hold_one_whole_sequence() -> None:
    report = preflight(big("rollout.server.max_total_tokens=8192"), GPUS, model_config=QWEN)
    assert "not even one" in row(report, "memory of a server rank").finding
    small = Place(ranks_per_node=4, gpus_per_node=8, gpu_memory_gib=18.0)
    assert row(preflight(big(), small, model_config=QWEN), "memory of a server rank").status is Status.error


def test_tokenizer_and_prompts_are_looked_at(tiny_qwen3: Path) -> None:
    ready = preflight(with_model(tiny_qwen3), Place())
    assert ready.ok, ready.errors
    assert row(ready, "tokenizer").finding == "259 tokens"
    short = preflight(with_model(tiny_qwen3, "data.max_prompt_tokens=8"), Place())
    assert row(short, "data").status is Status.error
    assert "data.max_prompt_tokens" in row(short, "data").advice
    chat = preflight(with_model(tiny_qwen3, "data.chat_template=true"), Place())
    assert row(chat, "tokenizer").status is Status.error


def test_disk_counts_what_is_kept(tiny_qwen3: Path, tmp_path: Path) -> None:
    config = with_model(tiny_qwen3, "checkpoint.every=5", "checkpoint.keep_last=2", f"output_dir={tmp_path}/new/run")
    found = row(preflight(config, Place()), "disk")
    assert found.status is Status.ok
    assert "3 checkpoints" in found.finding
    assert str(tmp_path) in found.finding
    huge = big("checkpoint.every=1", "checkpoint.keep_last=100000")
    found = row(preflight(huge, GPUS, model_config=QWEN), "disk")
    assert found.status is Status.error
    assert "checkpoint.keep_last" in found.advice


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/preflight.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    ready = run("experiment=quickstart", "--json")
    assert ready.returncode == 0, ready.stdout + ready.stderr
    report = json.loads(ready.stdout)
    assert report["ok"]
    assert report["memory"]["trainer"][0]["total"] > 0
    refused = run("experiment=quickstart", "parallel.tp=3", "--ranks-per-node", "3")
    assert refused.returncode == 1
    assert "num_attention_heads" in refused.stdout
    wrong = run("experiment=quickstart", "parallel.tpp=3")
    assert wrong.returncode == 2
    assert "parallel.tpp" in wrong.stderr


def test_parameters_are_counted() -> None:
    assert num_parameters(ModelShape.from_hf(QWEN)) == 8_190_735_360
