"""Mistakes end the training command at once: a clear message, a code other than zero, no process left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlvr.rollout.ports import free_port
from tests.distributed.ranks import end_of_ranks
from tests.e2e.runs import train
from tests.paths import ROOT

TRAIN = ROOT / "megatron_rlvr" / "train.py"


def assert_refused(overrides: list[str], *words: str, tmp_path: Path) -> None:
    run = train([*overrides, f"output_dir={tmp_path}"], timeout_s=120)
    assert run.survivors == []
    assert_says(run.code, run.output, *words, tmp_path=tmp_path)


def assert_says(code: int | None, output: str, *words: str, tmp_path: Path) -> None:
    assert code not in (0, None), output
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("**/metrics.jsonl")), "a refused run must leave no run folder"


QUICKSTART = ["experiment=quickstart", "parallel.tp=1"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=quickstart", "parallel.tpp=2"], ["parallel.tpp"]),
        (["experiment=nosuch"], ["experiment/nosuch", "quickstart"]),
        (["experiment=quickstart", "train.steps=many"], ["train.steps", "many"]),
        ([], ["experiment_name", "experiment="]),
        (["experiment=quickstart", "parallel.tp=2"], ["world size", "parallel.tp", "got 1"]),
        ([*QUICKSTART, "parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "no effect"]),
        ([*QUICKSTART, "parallel.vpp=2"], ["parallel.vpp", "got 2"]),
        ([*QUICKSTART, "advantage.K=1.5"], ["advantage.K", "1.5"]),
        ([*QUICKSTART, "advantage=grpo", "advantage.K=0.6"], ["advantage.K", "0.6"]),
        ([*QUICKSTART, "advantage.estimator=qea"], ["qea", "qae"]),
        ([*QUICKSTART, "loss.kl_cov.beta=2"], ["loss.kl_cov", "ppo"]),
        ([*QUICKSTART, "loss.aggregation=token_mean"], ["loss.aggregation", "token-mean"]),
        (
            [*QUICKSTART, "rollout.prompts_per_step=15", "train.updates_per_rollout=4"],
            ["rollout.prompts_per_step", "15"],
        ),
        ([*QUICKSTART, "train.max_tokens_per_microbatch=8"], ["train.max_tokens_per_microbatch", "8"]),
        (
            [*QUICKSTART, "rollout.urls=[http://127.0.0.1:1]", "rollout.server.tp=2"],
            ["rollout.server.tp", "no effect", "rollout.urls", "got 2"],
        ),
        ([*QUICKSTART, "model.path=/nowhere/model", "model.scratch=null"], ["model.path", "/nowhere/model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and any("=" in v for v in value) else "",
)
def test_configuration(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    """In a forked process, which has torch and Megatron already: their import is most of what a refusal takes."""
    [(code, output)] = end_of_ranks(TRAIN, [*overrides, f"output_dir={tmp_path}"], world_size=1, timeout_s=120)
    assert_says(code, output, *words, tmp_path=tmp_path)


def test_the_command_itself(tmp_path: Path) -> None:
    assert_refused([*QUICKSTART, "advantage.K=1.5"], "advantage.K", "1.5", tmp_path=tmp_path)


def with_model(model: Path) -> list[str]:
    return [
        *("experiment=quickstart", "parallel.tp=1", f"model.path={model}", "model.scratch=null"),
        *("warm_start.enabled=false", "warm_start.check_every=50"),
    ]


def test_heads_that_tensor_parallel_does_not_divide(tiny_qwen3: Path, tmp_path: Path) -> None:
    run = train([*with_model(tiny_qwen3), "parallel.tp=3", f"output_dir={tmp_path}"], ranks=3, timeout_s=120)
    assert run.code == 2
    assert run.survivors == []
    assert "parallel.tp" in run.output
    assert "num_attention_heads" in run.output
    assert run.output.count("error: ") == 1, "one rank speaks for all"
    assert run.output.splitlines()[-1].startswith("error: "), "the launcher adds nothing"


def test_layers_that_pipeline_stages_do_not_divide(tiny_qwen3: Path, tmp_path: Path) -> None:
    overrides = [*with_model(tiny_qwen3), "parallel.pp=3", f"output_dir={tmp_path}"]
    ends = end_of_ranks(TRAIN, overrides, world_size=3, timeout_s=120)
    assert all(code not in (0, None) for code, _ in ends)
    assert any("parallel.pp" in output and "num_hidden_layers" in output for _, output in ends)


def test_broken_jsonl_line(tiny_qwen3: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [json.dumps({"prompt": f"{n}+{n}=", "answer": str(2 * n)}) for n in range(20)]
    rows[6] = rows[6][:-4]
    data.write_text("\n".join(rows))
    overrides = [*with_model(tiny_qwen3), f"data.jsonl=[{data}]", "data.reasoning_gym=[]", "data.val_size=4"]
    assert_refused(overrides, f"{data}:7", tmp_path=tmp_path / "out")


def test_dead_server_url(tiny_qwen3: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    assert_refused([*with_model(tiny_qwen3), f"rollout.urls=[{url}]"], url, "rollout.urls", tmp_path=tmp_path)
