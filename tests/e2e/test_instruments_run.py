"""A whole training with every instrument on, at a learning rate at which the first order must tell the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.rollout.recording import evaluation_file, step_file, write_batch
from megatron_rlvr.types import EvalBatch, RolloutBatch, RolloutGroup
from tests.distributed.ranks import end_of_ranks
from tests.e2e.recorded import GROUP, PROMPTS, group

SCRIPT = Path(__file__).with_name("interrupted_rank.py")
STEPS, VOCAB = 6, 259
SOURCES = ("chain_sum", "word_sorting")


def of_two_sources(index: int, size: int) -> RolloutGroup:
    made = group(index, VOCAB, size)
    made.prompt.data_source = SOURCES[index % 2]
    return made


def record(folder: Path) -> Path:
    for step in range(STEPS + 1):
        answers = [of_two_sources(1000 + 10 * step + i, 1) for i in range(8)]
        write_batch(evaluation_file(folder, step), EvalBatch(groups=answers, metrics={}))
        groups = [of_two_sources(step * PROMPTS + i, GROUP) for i in range(PROMPTS)]
        write_batch(step_file(folder, step + 1), RolloutBatch(groups=groups, metrics={}))
    return folder


@pytest.fixture(scope="module")
def run(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensor-parallel ranks, two updates a rollout, KL-Cov under a controller, K of one source its own."""
    folder = tmp_path_factory.mktemp("instruments")
    overrides = [
        *("experiment=quickstart", "warm_start.enabled=false"),
        *(f"model.path={tiny_qwen3}", "parallel.tp=2", "rollout=replay"),
        *(f"rollout.replay_from={record(folder / 'rollouts')}", f"rollout.prompts_per_step={PROMPTS}"),
        *(f"rollout.group_size={GROUP}", "data.max_prompt_tokens=64", f"train.steps={STEPS}", "eval.every=2"),
        *("train.updates_per_rollout=2", "optim.lr=1e-6", "optim.warmup_steps=0", "diagnostics.every=1"),
        *("loss=kl_cov", "loss.kl_cov.ratio=0.05", "controller.target_entropy=3.0"),
        "controller.actuators=[{name: kl_cov, low: 0.01, high: 0.3, gain: 0.1, max_step: 0.05}]",
        "data.reasoning_gym=[{name: chain_sum}, {name: word_sorting}]",
        "advantage.K_by_source=[{source: word_sorting, K: '0.6'}]",
        *("logging.console=plain", f"output_dir={folder / 'out'}", "run_name=all"),
    ]
    ends = end_of_ranks(SCRIPT, [json.dumps({}), *overrides], world_size=2, timeout_s=120)
    assert [code for code, _ in ends] == [0, 0], ends
    return folder / "out" / "quickstart" / "all"


@pytest.fixture(scope="module")
def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_first_order_is_what_is_measured(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == STEPS
    last = rows[-1]
    for tail in ("", *(f"/source/{source}" for source in SOURCES)):
        assert last[f"agreement/p4_m1/num_steps{tail}"] == STEPS
        assert last[f"agreement/p4_m1/ratio{tail}"] == pytest.approx(1.0, abs=0.1)
        assert last[f"agreement/p4_m1/slope{tail}"] == pytest.approx(1.0, abs=0.1)
        assert last[f"agreement/p4_m1/correlation{tail}"] > 0.99
        # What the other predictors are worth is measured too, and nothing is expected of it.
        assert last[f"agreement/p1_m2/num_steps{tail}"] == STEPS - 1


def test_what_is_free_is_in_every_row(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["safety/holds"] == 1.0
        assert row["dynamics/p1"] == -row["cov/mean"]
        assert row["cov/q50"] <= row["cov/q80"] <= row["cov/q98"] <= row["cov/q998"] <= row["cov/max"] * (1 + 1e-6)
        total = sum(row[f"dynamics/p3/source/{source}"] for source in SOURCES)
        assert total == pytest.approx(row["dynamics/p3"], rel=1e-9)
    assert rows[-1]["law/num_points"] == 4
    assert rows[-1]["law/valid"] == 0.0, "QAE, KL-Cov and a controller act"


def test_report_shows_it(run: Path) -> None:
    page = (run / "report.html").read_text()
    for view in (
        *("Entropy dynamics", "Covariance", "The law R = −a exp(H) + b", "Regimes, K and control"),
        f"Tokens of step {STEPS}",
    ):
        assert f"<h2>{view}</h2>" in page
    for title in ("Predicted against measured", "Entropy by data source", "K", "Actuator kl_cov"):
        assert f"<h3>{title}</h3>" in page
    assert 'class="tok picked"' in page or 'class="tok cold picked"' in page, "selected tokens are marked"
