"""``report.html``: a run in one file that needs no network, rewritten as the run goes on."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_rlvr.report.charts import SMOOTH_FROM, Chart, Series, number
from megatron_rlvr.report.entropy_view import control_section, covariance_section, dynamics_section, entropy_chart
from megatron_rlvr.report.eval_sets_view import eval_sets_section
from megatron_rlvr.report.evaluations import Row, evaluations
from megatron_rlvr.report.law_view import law_section
from megatron_rlvr.report.live_view import clock
from megatron_rlvr.report.metrics_writer import METRICS_FILE, read_metrics
from megatron_rlvr.report.panels import chart_of, figures, present
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG
from megatron_rlvr.report.samples import CONTENT_MARK, SAMPLES_DIR
from megatron_rlvr.report.token_map import token_map_section

REPORT_FILE = "report.html"
ENDS = 5
"""Steps at either end of a run whose mean stands for its start and its end."""

HIGHLIGHTS = (
    ("model", "model.path", ""),
    ("precision", "model.dtype", ""),
    ("advantage", "advantage.estimator", ""),
    ("quantile level K", "advantage.K", "advantage.estimator=qae"),
    ("policy loss", "loss.name", ""),
    ("clip range", ("loss.eps_low", "loss.eps_high"), "loss.name=ppo"),
    *(
        ("clip range", (f"loss.{name}.eps_low", f"loss.{name}.eps_high"), f"loss.name={name}")
        for name in ("clip_cov", "gspo", "cispo")
    ),
    *(("share of tokens selected", f"loss.{name}.ratio", f"loss.name={name}") for name in ("clip_cov", "kl_cov")),
    ("penalty beta", "loss.kl_cov.beta", "loss.name=kl_cov"),
    ("aggregation", "loss.aggregation", ""),
    ("learning rate", "optim.lr", ""),
    ("prompts a step", "rollout.prompts_per_step", ""),
    ("responses a prompt", "rollout.group_size", ""),
    ("updates a rollout", "train.updates_per_rollout", ""),
    ("temperature", "rollout.temperature", ""),
    ("longest response", "rollout.max_response_tokens", ""),
    ("TP / PP / CP / EP", ("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep"), ""),
    ("seed", "train.seed", ""),
    ("diagnostics every", "diagnostics.every", ""),
)
"""Label, settings, and the setting without which they would have no effect (empty: none)."""


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` from what the run's folder holds so far, in one step (a reader never sees half a page).

    Reads ``metrics.jsonl``, and ``config.yaml`` and ``samples/`` where they are there; the time it takes grows with the
    number of steps.

    Returns:
        The file.

    Raises:
        FileNotFoundError: the run has no ``metrics.jsonl``.
        ValueError: a line of it is broken.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    config_path = run_dir / RESOLVED_CONFIG
    config = OmegaConf.load(config_path) if config_path.exists() else None
    experiment, run = escape(run_dir.parent.name), escape(run_dir.name)
    parts = [
        f"<header><h1>{experiment}</h1><p>run {run}{_progress(rows, config)}</p></header>",
        _tiles(rows),
        figures(charts_of(rows)),
        eval_sets_section(rows),
        dynamics_section(rows),
        covariance_section(rows),
        law_section(rows),
        control_section(rows),
        token_map_section(run_dir),
        _settings(config) if isinstance(config, DictConfig) else "",
        _samples(run_dir),
        _footer(rows),
    ]
    assets = resources.files("megatron_rlvr.report")
    css = assets.joinpath("page.css").read_text(encoding="utf-8")
    script = assets.joinpath("page.js").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{experiment} / {run}</title><style>{css}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )
    path = run_dir / REPORT_FILE
    fresh = run_dir / f".{REPORT_FILE}.tmp"
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
    return path


def _progress(rows: Sequence[Row], config: Any) -> str:
    if not rows:
        return ", no step finished yet"
    planned = OmegaConf.select(config, "train.steps") if config is not None else None
    of = f" of {planned}" if planned is not None else ""
    seconds = sum(sum(present(rows, key)) for key in ("time/rollout_s", "time/train_s", "time/sync_s"))
    return f", step {rows[-1]['step']}{of}, {clock(seconds)} in steps"


def _footer(rows: Sequence[Row]) -> str:
    lines = "Pale lines are single steps, bold ones their moving average. " if len(rows) >= SMOOTH_FROM else ""
    return f"<footer>{lines}All values: {METRICS_FILE} beside this file.</footer>"


# ---- tiles


def _tiles(rows: Sequence[Row]) -> str:
    tiles = [
        _accuracy_tile(rows),
        _trend_tile(rows, "reward/mean", "Training reward"),
        _trend_tile(rows, "entropy/mean", "Entropy", unit="nats a token"),
        _mean_tile(rows, "advantage/zero_fraction", "Zero advantage", lambda v: f"{v:.0%}"),
        _time_tile(rows),
        _mean_tile(rows, "tokens_per_s", "Throughput", number, unit="tokens/s"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if any(tiles) else ""


def _tile(heading: str, value: str, below: str, *, main: bool = False) -> str:
    return (
        f'<div class="card tile{" main" if main else ""}"><h3>{escape(heading)}</h3>'
        f"<strong>{escape(value)}</strong><span>{escape(below)}</span></div>"
    )


def _accuracy_tile(rows: Sequence[Row]) -> str:
    measured = evaluations(rows)
    if not measured:
        return ""
    first, last = measured[0], measured[-1]
    below = f"step {first.step} to {last.step}"
    if last.standard_error is not None:
        below = f"{last.num_problems} problems, ±{last.standard_error * 100:.1f} points, {below}"
    value = f"{last.accuracy:.1%}" if first is last else f"{first.accuracy:.1%} → {last.accuracy:.1%}"
    return _tile("Held-out accuracy", value, below, main=True)


def _trend_tile(rows: Sequence[Row], key: str, heading: str, unit: str = "") -> str:
    seen = present(rows, key)
    if not seen:
        return ""
    width = min(ENDS, max(1, len(seen) // 2))
    start, end = statistics.fmean(seen[:width]), statistics.fmean(seen[-width:])
    below = unit or (f"means of {width} steps" if width > 1 else "first and last step")
    return _tile(heading, f"{start:.2f} → {end:.2f}", below)


def _mean_tile(rows: Sequence[Row], key: str, heading: str, form: Any, unit: str = "") -> str:
    seen = present(rows, key)
    if not seen:
        return ""
    return _tile(heading, form(statistics.fmean(seen)), f"{unit}, mean".lstrip(", "))


def _time_tile(rows: Sequence[Row]) -> str:
    totals = {name: sum(present(rows, f"time/{name}_s")) for name in ("rollout", "train", "sync")}
    total = sum(totals.values())
    if total <= 0:
        return ""
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in totals.items())
    return _tile("Time a step", f"{total / len(rows):.3g} s", shares)


# ---- charts


def charts_of(rows: Sequence[Row]) -> list[Chart]:
    """The charts for which there are values; what a run is for comes first."""
    charts = [
        _accuracy_chart(rows),
        chart_of(rows, "Reward", {"reward/mean": "mean", "reward/max": "largest"}, from_zero=True),
        entropy_chart(rows),
        chart_of(
            rows,
            "Zero-advantage share",
            {"advantage/zero_fraction": "share"},
            percent=True,
            bounds=(0.0, 1.0),
            from_zero=True,
        ),
        chart_of(rows, "Token covariance", {"cov/mean": "mean"}, note="of log-probability and advantage"),
        chart_of(rows, "Response length", {"response/length_mean": "mean"}, unit="tokens", from_zero=True),
        chart_of(
            rows,
            "Time a step",
            {
                "time/rollout_s": "rollout",
                "time/train_s": "train",
                "time/sync_s": "weight sync",
                "time/diagnostics_s": "diagnostics",
                "time/record_s": "record",
            },
            unit="s",
            stacked=True,
        ),
        chart_of(
            rows,
            "Log-prob difference",
            {"rollout/logprob_diff_mean": "mean", "rollout/logprob_diff_max": "largest"},
            note="trainer against engine, nats",
            log=True,
        ),
        chart_of(rows, "Policy loss", {"loss/policy": "loss"}),
        chart_of(rows, "Gradient norm", {"grad_norm": "norm"}, note="before clipping", from_zero=True),
        chart_of(rows, "Throughput", {"tokens_per_s": "tokens"}, unit="tokens/s", from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _accuracy_chart(rows: Sequence[Row]) -> Chart | None:
    measured = evaluations(rows)
    if not measured:
        return None
    accuracy = Series(
        label="accuracy", values=[e.accuracy for e in measured], errors=[e.standard_error for e in measured]
    )
    return Chart(
        title="Held-out accuracy",
        note="± one standard error over the problems" if any(e.num_problems for e in measured) else "",
        steps=[e.step for e in measured],
        series=[accuracy],
        percent=True,
        points=True,
        bounds=(0.0, 1.0),
        from_zero=True,
    )


# ---- settings and samples


def _settings(config: DictConfig) -> str:
    cells = []
    for label, keys, condition in HIGHLIGHTS:
        if not _holds(config, condition):
            continue
        found = [OmegaConf.select(config, key) for key in ([keys] if isinstance(keys, str) else keys)]
        if any(value is not None for value in found):
            text = " / ".join("–" if value is None else str(value) for value in found)
            cells.append(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>")
    whole = escape(OmegaConf.to_yaml(config))
    return (
        f'<h2>Settings</h2><dl class="card settings" style="margin:0">{"".join(cells)}</dl>'
        f'<details class="card"><summary>The whole configuration</summary><pre>{whole}</pre></details>'
    )


def _holds(config: DictConfig, condition: str) -> bool:
    """Whether a setting has a value; one that the file does not name may have any."""
    key, _, value = condition.partition("=")
    return not key or OmegaConf.select(config, key) in (None, value)


def _samples(run_dir: Path) -> str:
    files = sorted((run_dir / SAMPLES_DIR).glob("step_*.txt"))
    if not files:
        return ""
    # The newest and, to compare, the oldest.
    chosen = [files[-1], *files[:1]] if len(files) > 1 else files
    blocks = [_sample_block(path, is_open=path is chosen[0]) for path in chosen]
    return "<h2>Sampled rollouts</h2>" + "".join(blocks)


def _sample_block(path: Path, *, is_open: bool) -> str:
    heading, *lines = path.read_text(encoding="utf-8").split("\n")
    parts: list[str] = []
    content: list[str] = []

    def close_content() -> None:
        if content:
            parts.append(f"<pre>{escape(chr(10).join(content))}</pre>")
            content.clear()

    for line in lines:
        if line.startswith(CONTENT_MARK):
            content.append(line.removeprefix(CONTENT_MARK))
            continue
        close_content()
        if line.startswith("prompt "):
            parts.append(f"<h4>{escape(line.capitalize())}</h4>")
        elif line.startswith("response "):
            parts.append(_verdict(line))
        elif line:
            parts.append(f'<p class="fact">{escape(line.capitalize())}</p>')
    close_content()
    return (
        f'<details class="card"{" open" if is_open else ""}><summary>{escape(heading.capitalize())}</summary>'
        f'<div class="sample">{"".join(parts)}</div></details>'
    )


def _verdict(line: str) -> str:
    first, _, facts = line.partition(", ")
    kind = "right" if first.endswith("right") else "wrong"
    return f'<p class="verdict {kind}"><b>{escape(first.capitalize())}</b>, {escape(facts)}</p>'
