"""The page of a comparison: one HTML file that needs no network, a Markdown table, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_rlvr.comparison.drawing import curve_panel, dots, mean_curve, value_range
from megatron_rlvr.comparison.matrix import Matrix
from megatron_rlvr.comparison.results import CURVES, SCALARS, MethodResult
from megatron_rlvr.comparison.verdicts import COLUMNS, PERCENT, Verdict, caution, label_of, table, verdicts

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "comparison.html", "comparison.md", "comparison.json"
DOTTED = ("accuracy_end", "accuracy_gain", "reward_end", "entropy_end", "zero_share", "cov", "length_end", "step_s")
PANELS = {"eval/accuracy": "Held-out accuracy", **{key: label.capitalize() for key, label in CURVES.items()}}
PERCENT_CURVES = ("eval/accuracy", "reward/mean", "advantage/zero_fraction")
ROUNDING = 6

CSS = """
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); }
td.wide { white-space: normal; min-width: 300px; }
tr > :first-child { position: sticky; left: 0; background: var(--card); }
.note { padding: 14px 16px; margin-top: 14px; }
.note p { margin: 0 0 8px; } .note p:last-child { margin: 0; } .note ul { margin: 4px 0 10px; padding-left: 20px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; }
.panels figure { padding: 8px 8px 4px; } .panels figcaption { font-size: 13px; }
.seed { fill: var(--c1); fill-opacity: 0.75; stroke: var(--card); stroke-width: 1; }
.base { stroke: var(--faint); stroke-dasharray: 3 3; }
line.mean { stroke: var(--c2); stroke-width: 2.5; }
path.one { fill: none; stroke: var(--c1); stroke-width: 1; opacity: 0.45; }
path.mean { fill: none; stroke: var(--c1); stroke-width: 2; stroke-linejoin: round; }
path.reference { fill: none; stroke: var(--faint); stroke-width: 2; }
.dots svg text { fill: var(--soft); }
"""


def write_page(matrix: Matrix, results: Sequence[MethodResult], out: Path, *, remark: str) -> list[Path]:
    """Writes ``comparison.html``, ``comparison.md`` and ``comparison.json``.

    Args:
        remark: on the circumstances, such as the machine; empty for none.

    Returns:
        The three files.

    Raises:
        ValueError: no cell of the matrix is finished.
    """
    if not results:
        raise ValueError("a comparison needs at least one finished cell, got none")
    out.mkdir(parents=True, exist_ok=True)
    written = {
        HTML_FILE: html_page(matrix, results, remark=remark),
        MARKDOWN_FILE: markdown(matrix, results, remark=remark),
        JSON_FILE: json.dumps(numbers(matrix, results, remark=remark), indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in written.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in written]


def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines, each as one line."""
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def _state(matrix: Matrix, results: Sequence[MethodResult]) -> str:
    done = sum(len(result.cells) for result in results)
    total = len(matrix.methods) * len(matrix.seeds)
    unfinished = "" if done == total else f" (unfinished: {total} were asked for)"
    return f"{done} runs{unfinished}: {len(matrix.methods)} methods, seeds {', '.join(map(str, matrix.seeds))}"


# ---- HTML


def html_page(matrix: Matrix, results: Sequence[MethodResult], *, remark: str) -> str:
    """The whole page."""
    css = resources.files("megatron_rlvr.report").joinpath("page.css").read_text(encoding="utf-8") + CSS
    notes = "".join(f"<p>{escape(block)}</p>" for block in [*paragraphs(matrix.note), *paragraphs(remark)])
    parts = [
        f"<header><h1>{escape(matrix.title)}</h1><p>{escape(_state(matrix, results))}</p></header>",
        f'<div class="card note">{notes}</div>' if notes else "",
        "<h2>What moved, and what did not</h2>",
        _verdicts_html(verdicts(results), caution(matrix, results)),
        "<h2>All methods</h2>",
        _table_html(results),
        f"<p class='legend'>± is the sample standard deviation over seeds. Baseline: "
        f"{escape(label_of(matrix, matrix.baseline))}. The law R = −a exp(H) + b is fitted to the evaluations of all "
        "seeds together; its ceiling is b − a.</p>",
        "<h2>Every seed</h2>",
        _dots_html(matrix, results),
        *(_panels_html(key, title, matrix, results) for key, title in PANELS.items()),
        "<footer>Thin lines are seeds, the bold one their mean, the grey one the mean of the baseline. All numbers: "
        f"{JSON_FILE} beside this file.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(matrix.title)}</title><style>{css}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _verdicts_html(found: Sequence[Verdict], warning: str) -> str:
    parts = [f"<p>{escape(warning)}</p>"]
    for verdict in found:
        parts.append(f"<p><b>{escape(verdict.title)}</b>: {escape(_summary(verdict))}</p>")
        if verdict.clear:
            items = "".join(f"<li>{escape(label)}: {escape(text)}</li>" for label, text in verdict.clear)
            parts.append(f"<ul>{items}</ul>")
    return f'<div class="card note">{"".join(parts)}</div>'


def _summary(verdict: Verdict) -> str:
    if not verdict.clear:
        return "no method differs clearly from the baseline."
    unclear = ", ".join(label for label, _ in verdict.unclear)
    return "clearly different from the baseline:" if not unclear else f"not clearly different: {unclear}. Clearly:"


def _table_html(results: Sequence[MethodResult]) -> str:
    """Two tables, each as wide as the page: what was reached, and how."""
    border = COLUMNS.index("covariance")
    return _columns_html(results, range(border)) + _columns_html(results, [0, *range(border, len(COLUMNS))])


def _columns_html(results: Sequence[MethodResult], places: Sequence[int]) -> str:
    head = "".join(f'<th scope="col">{escape(COLUMNS[place])}</th>' for place in places)
    body = ""
    for row in table(results):
        cells = (
            f"<td{' class=wide' if COLUMNS[place] == 'law' else ''}>{escape(row[place])}</td>" for place in places[1:]
        )
        body += f'<tr><th scope="row">{escape(row[places[0]])}</th>{"".join(cells)}</tr>'
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="All methods"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _dots_html(matrix: Matrix, results: Sequence[MethodResult]) -> str:
    baseline = label_of(matrix, matrix.baseline)
    figures = []
    for key in DOTTED:
        rows = [(result.method.label, result.scalars[key]) for result in results if key in result.scalars]
        if rows:
            title = SCALARS[key].capitalize()
            svg = dots(rows, title=title, baseline=baseline, percent=key in PERCENT)
            figures.append(f'<figure class="card"><figcaption><h3>{escape(title)}</h3></figcaption>{svg}</figure>')
    return f'<div class="charts dots">{"".join(figures)}</div>'


def _panels_html(key: str, title: str, matrix: Matrix, results: Sequence[MethodResult]) -> str:
    shown = [(result, [cell.curves[key] for cell in result.cells if key in cell.curves]) for result in results]
    shown = [(result, curves) for result, curves in shown if curves]
    every = [curve for _, curves in shown for curve in curves]
    if not every:
        return ""
    bounds = value_range([value for curve in every for value in curve.values()])
    steps = (min(min(curve) for curve in every), max(max(curve) for curve in every))
    reference = next((mean_curve(curves) for result, curves in shown if result.method.name == matrix.baseline), None)
    panels = []
    for result, curves in shown:
        svg = curve_panel(
            curves,
            None if result.method.name == matrix.baseline else reference,
            title=f"{title}, {result.method.label}",
            bounds=bounds,
            steps=steps,
            percent=key in PERCENT_CURVES,
        )
        caption = f"<figcaption>{escape(result.method.label)}</figcaption>"
        panels.append(f'<figure class="card">{caption}{svg}</figure>')
    return f'<h2>{escape(title)}</h2><div class="panels">{"".join(panels)}</div>'


# ---- Markdown and JSON


def markdown(matrix: Matrix, results: Sequence[MethodResult], *, remark: str) -> str:
    """The same findings and the table, for a repository."""
    lines = [f"# {matrix.title}", "", f"{_state(matrix, results)}.", ""]
    for block in [*paragraphs(matrix.note), *paragraphs(remark)]:
        lines += [block, ""]
    lines += ["## What moved, and what did not", "", caution(matrix, results), ""]
    for verdict in verdicts(results):
        lines.append(f"- **{verdict.title}**: {_summary(verdict)}")
        lines += [f"  - {label}: {text}" for label, text in verdict.clear]
    lines += ["", "## All methods", "", f"Baseline: {label_of(matrix, matrix.baseline)}. ± is the sample standard "
              "deviation over seeds, [ ] a 95% t interval of the difference under the same seed. The law is fitted to "
              "the evaluations of all seeds together.", ""]  # fmt: skip
    lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS)), *(_row(row) for row in table(results)), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def numbers(matrix: Matrix, results: Sequence[MethodResult], *, remark: str) -> dict[str, Any]:
    """Everything the page shows, seed by seed."""
    return {
        "matrix": asdict(matrix),
        "remark": remark,
        "quantities": SCALARS,
        "methods": [
            {
                "name": result.method.name,
                "label": result.method.label,
                "cells": [
                    {
                        "seed": cell.seed,
                        "scalars": _rounded(cell.scalars),
                        "curves": {key: _rounded(curve) for key, curve in cell.curves.items()},
                        "shared_server": cell.record.shared_server,
                        "made_start": cell.record.made_start,
                    }
                    for cell in result.cells
                ],
                "mean": _rounded({key: spread.mean for key, spread in result.scalars.items()}),
                "sd": _rounded({key: s.sd for key, s in result.scalars.items() if s.sd is not None}),
                "difference": {
                    key: {"mean": round(spread.mean, ROUNDING), "half_width_95": _round(spread.half_width)}
                    for key, spread in result.differences.items()
                },
                "law": {
                    "verdict": result.law.verdict,
                    **({} if result.law.fit is None else _rounded(asdict(result.law.fit))),
                },
            }
            for result in results
        ],
    }


def _rounded(values: dict[Any, Any]) -> dict[Any, Any]:
    return {key: _round(value) for key, value in values.items()}


def _round(value: Any) -> Any:
    return round(value, ROUNDING) if isinstance(value, float) else value
