import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.report import METRICS_FILE, RESOLVED_CONFIG, MetricsWriter, write_report, write_samples
from megatron_rlvr.report.evaluations import evaluations
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup

VOID = {"meta", "line", "path", "circle", "br"}


class Page(HTMLParser):
    """Checks that tags nest, collects text and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def row(step: int, **more: float | None) -> dict:
    keys = (
        "reward/mean reward/max entropy/mean advantage/zero_fraction cov/mean loss/policy grad_norm "
        "rollout/logprob_diff_mean rollout/logprob_diff_max response/length_mean tokens_per_s"
    )
    values: dict = dict.fromkeys(keys.split(), step / 10)
    times = {"time/rollout_s": 6.0, "time/train_s": 3.0, "time/sync_s": 1.0}
    return {"step": step, "policy_version": step, **values, **times, **more}


def make_run(tmp_path: Path, rows: list[dict]) -> Path:
    run = tmp_path / "quickstart" / "2026-01-31_14-07-55"
    run.mkdir(parents=True)
    with MetricsWriter(run, tensorboard=False, wandb=False) as writer:
        for each in rows:
            writer.write(each)
    return run


def test_the_report_shows_what_the_run_was_for_and_loads_nothing(tmp_path: Path) -> None:
    rows = [row(s) for s in range(1, 41)]
    rows[0] |= {"eval/accuracy": 0.25, "eval/num_problems": 100}
    rows[-1] |= {"eval/accuracy": 0.5, "eval/num_problems": 100}
    run = make_run(tmp_path, rows)
    (run / RESOLVED_CONFIG).write_text(
        "advantage: {estimator: qae, K: '0.4'}\nloss: {eps_low: 0.2, eps_high: 0.28}\ntrain: {steps: 40}\n"
    )
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.loads == []
    assert not re.findall(r"https?://|@import|url\(", path.read_text(encoding="utf-8"))
    for expected in (
        "25.0% → 50.0%",
        "100 problems, ±5.0 points, step 1 to 40",
        "rollout 60%, train 30%, sync 10%",
        "step 40 of 40, 6:40 in steps",
        "0.30 → 3.80",
        "0.2 / 0.28",
        "qae",
        "moving average",
    ):
        assert expected in page.text, expected
    titles = re.findall(r"<h3>([^<]+)</h3><b>", path.read_text(encoding="utf-8"))
    assert titles == [
        "Held-out accuracy",
        "Reward",
        "Entropy",
        "Zero-advantage share",
        "Token covariance",
        "Response length",
        "Time a step",
        "Log-prob difference",
        "Policy loss",
        "Gradient norm",
        "Throughput",
    ]


def test_settings_without_effect_are_not_shown_as_the_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(1)])
    (run / RESOLVED_CONFIG).write_text(
        "advantage: {estimator: grpo, K: '0.4'}\n"
        "loss: {name: kl_cov, eps_low: 0.2, eps_high: 0.28, kl_cov: {ratio: 2e-3, beta: 1.0}, "
        "gspo: {eps_low: 3.0e-4, eps_high: 4.0e-4}}\n"
    )
    page = write_report(run).read_text(encoding="utf-8")
    settings = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert settings == {
        "advantage": "grpo",
        "policy loss": "kl_cov",
        "share of tokens selected": "0.002",
        "penalty beta": "1.0",
    }


def test_accuracy_before_the_first_step_is_the_start() -> None:
    rows = [row(1, **{"eval/start_accuracy": 0.2, "eval/num_problems": 16.0}), row(2, **{"eval/accuracy": 0.5})]
    start, end = evaluations(rows)
    assert (start.step, start.accuracy, start.standard_error) == (0, 0.2, pytest.approx(0.1))
    assert (end.step, end.accuracy, end.standard_error) == (2, 0.5, None)


def test_a_run_that_has_just_begun_or_lost_its_metrics_still_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    assert "no step finished yet" in Page(write_report(run).read_text(encoding="utf-8")).text
    (run / METRICS_FILE).write_text('{"step": 1, "reward/mean": null, "entropy/mean": 0.5}\n')
    page = write_report(run).read_text(encoding="utf-8")
    assert re.findall(r"<h3>([^<]+)</h3><b>", page) == ["Entropy"]
    assert not list(run.glob(".report*"))


def test_samples_of_both_ends_are_shown_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(1)])
    for step, text in ((1, "<script>alert(1)</script>"), (2, "middle"), (3, "a < b")):
        rollout = Rollout(
            response_ids=np.zeros(2, np.int32),
            rollout_logprobs=np.zeros(2, np.float32),
            text=text,
            finish_reason=FinishReason.stop,
            weight_versions=[(0, 0, 2)],
            correctness=1.0,
            reward=1.0,
        )
        prompt = Prompt(uid="train/0", text="2<3?", input_ids=np.zeros(1, np.int32), answer="yes", data_source="s")
        write_samples(run, step, [RolloutGroup(prompt=prompt, rollouts=[rollout], index=0)], count=1)
    source = write_report(run).read_text(encoding="utf-8")
    text = Page(source).text
    assert source.count("<script>") == 1
    assert "Step 1" in text
    assert "Step 3" in text
    assert "Step 2" not in text
    assert "<script>alert(1)</script>" in text
    assert "a < b" in text
    assert "2<3?" in text
