"""Cards of a page: charts of metrics over the steps, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_rlvr.report.charts import Chart, Series, draw
from megatron_rlvr.report.evaluations import Row

NUM_COLORS = 8
"""Of the page's palette."""


def present(rows: Sequence[Row], key: str) -> list[float]:
    """Values of a metric where it has one."""
    return [row[key] for row in rows if row.get(key) is not None]


def chart_of(rows: Sequence[Row], title: str, labels: Mapping[str, str], **options: Any) -> Chart | None:
    """A chart of the keys that have values, over the steps that have one; None where none has.

    Args:
        labels: label by key of the metric, in the order of the colours.
        **options: fields of `Chart`.
    """
    found = [key for key in labels if present(rows, key)]
    measured = [row for row in rows if any(row.get(key) is not None for key in found)]
    if not measured:
        return None
    series = [
        Series(
            label=labels[key],
            # By place in `labels`, so that a quantity keeps its colour when another is missing.
            color=1 + list(labels).index(key) % NUM_COLORS,
            values=[row.get(key) for row in measured],
            pale=labels[key] == "largest",
        )
        for key in found
    ]
    return Chart(title=title, steps=[row["step"] for row in measured], series=series, **options)


def figure(chart: Chart) -> str:
    """A chart as a card with its latest value and its legend."""
    main = next((s for s in chart.series if not s.pale), chart.series[0])
    latest = next((v for v in reversed(main.values) if v is not None), None)
    if chart.stacked:
        latest = sum(next((v for v in reversed(s.values) if v is not None), 0.0) for s in chart.series)
    labels = [(s.color, s.label) for s in chart.series if len(chart.series) > 1]
    # Shares that fill the chart, and lines of equal rank, have no one latest value.
    value = "" if chart.no_headline else f"<b>{escape(chart.format(latest))}</b>"
    return card(chart.title, value, labels, chart.note, draw(chart))


def card(title: str, value: str, labels: Sequence[tuple[int, str]], note: str, svg: str) -> str:
    """A drawing with heading, legend (colour and label) and a note."""
    keys = [f'<span class="key c{color}">{escape(label)}</span>' for color, label in labels]
    if note:
        keys.append(f"<span>{escape(note)}</span>")
    below = f'<p class="legend">{"".join(keys)}</p>' if keys else ""
    return f'<figure class="card"><figcaption><h3>{escape(title)}</h3>{value}</figcaption>{below}{svg}</figure>'


def figures(charts: Sequence[Chart | None]) -> str:
    """A grid of the charts that show something; empty without any."""
    cards = [figure(chart) for chart in charts if chart is not None and _has_marks(chart)]
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""


def _has_marks(chart: Chart) -> bool:
    """Whether a value can be drawn: a logarithmic axis has no place for 0 and below."""
    return not chart.log or any(value is not None and value > 0 for s in chart.series for value in s.values)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A card with a table; the first cell of a row is its heading. Wide ones scroll inside the card."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<section class="card table"><h3>{escape(title)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(title)}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}'
        "</section>"
    )
