"""Views on the entropy: predicted and measured change, covariance, regimes, K, controller."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlvr.report.charts import Chart, Series, number
from megatron_rlvr.report.evaluations import Row
from megatron_rlvr.report.panels import NUM_COLORS, chart_of, figures, present, table

TABLE_1 = (
    ("all", "cov/mean", None, 0.003),
    ("top 50%", "cov/top50_mean", "cov/q50", 0.152),
    ("top 20%", "cov/top20_mean", "cov/q80", 0.351),
    ("top 2%", "cov/top2_mean", "cov/q98", 1.385),
    ("top 0.2%", "cov/top02_mean", "cov/q998", 3.112),
    ("top 0.02%", "cov/top002_mean", "cov/q9998", 5.654),
)
"""Tokens, metric of their mean covariance and of where they begin, Cui et al.'s Table 1 (Qwen2.5-7B, step 1)."""
PREDICTORS, MEASURED = ("p1", "p2", "p3", "p4"), ("m1", "m2")
CONTROLLER_VALUE = "controller/value/"
AGREEMENT_HEADINGS = ("pair", "steps", "ratio", "correlation", "same sign", "slope")
AGREEMENT_NOTE = (
    "P1: minus the batch covariance of log-prob and advantage. P2: minus the group-wise covariance. P3: per-token "
    "attribution. P4: exact first order of the real update. M1: change on the same tokens. M2: change from these "
    "rollouts to the next. Ratio: measured by predicted, summed over the window; only P4 against M1 is in one unit and "
    "expected near 1, the others do not know the step size: judge them by correlation and sign."
)


def entropy_chart(rows: Sequence[Row]) -> Chart | None:
    """The entropy in both definitions, and where P4 said that it would go."""
    labels = {"entropy/mean": "mean over tokens", "entropy/sequence_mean": "over responses"}
    chart = chart_of(rows, "Entropy", labels, unit="nats", from_zero=True)
    if chart is None:
        return None
    for series in chart.series[1:]:
        series.color, series.pale = 3, True
    predicted = {
        row["step"] + 1: row["entropy/mean"] + row["dynamics/p4"]
        for row in rows
        if row.get("dynamics/p4") is not None and row.get("entropy/mean") is not None
    }
    values = [predicted.get(step) for step in chart.steps]
    if any(value is not None for value in values):
        chart.series.append(Series(label="predicted a step before", values=values, color=2, marks=True))
    return chart


def dynamics_section(rows: Sequence[Row]) -> str:
    """Predicted against measured change of the entropy, in charts and one table."""
    charts = [
        chart_of(
            rows,
            "Entropy change of an update",
            {"dynamics/m1": "measured (M1)", "dynamics/p4": "predicted (P4)"},
            note="nats, on the same tokens",
            points=True,
        ),
        chart_of(
            rows,
            "Where the change comes from (P3)",
            {
                "dynamics/p3/positive": "A > 0",
                "dynamics/p3/negative": "A < 0",
                "dynamics/p3/hard": "hard queries",
                "dynamics/p3/easy": "easy queries",
            },
            note="per unit step of the logits",
            points=True,
            no_headline=True,
        ),
        chart_of(
            rows,
            "Entropy by sign of the advantage",
            {"entropy/positive_advantage": "A > 0", "entropy/negative_advantage": "A < 0"},
            unit="nats",
            from_zero=True,
            no_headline=True,
        ),
        _by_source(rows, "entropy/mean", "Entropy by data source", unit="nats", from_zero=True),
        chart_of(
            rows,
            "Group covariance by accuracy",
            {
                "dynamics/p2/accuracy_0_25": "up to 25% right",
                "dynamics/p2/accuracy_25_50": "up to 50%",
                "dynamics/p2/accuracy_50_75": "up to 75%",
                "dynamics/p2/accuracy_75_100": "more",
            },
            note="P2, predicted direction of the entropy",
            no_headline=True,
        ),
        chart_of(
            rows,
            "Prop 4.2 on the groups",
            {
                "safety/change": "at b_K",
                "safety/opposite_change": "at 1 − b_K",
                "safety/lower": "lower bound",
                "safety/upper": "upper bound",
            },
            note="surrogate change per unit step, mean over groups",
            no_headline=True,
        ),
    ]
    parts = figures(charts) + _agreement_table(rows)
    return f"<h2>Entropy dynamics</h2>{parts}" if parts else ""


def _agreement_table(rows: Sequence[Row]) -> str:
    cells = []
    for predictor in PREDICTORS:
        for measured in MEASURED:
            prefix = f"agreement/{predictor}_{measured}/"
            last = next((row for row in reversed(rows) if row.get(f"{prefix}num_steps")), None)
            if last is None:
                continue
            correlation, sign, slope, ratio = (
                last.get(prefix + statistic) for statistic in ("correlation", "sign_agreement", "slope", "ratio")
            )
            cells.append(
                (
                    f"{predictor} → {measured}".upper(),
                    f"{int(last[prefix + 'num_steps'])}",
                    "–" if ratio is None else number(ratio),
                    _shown(correlation, ".2f"),
                    _shown(sign, ".0%"),
                    "–" if slope is None else number(slope),
                )
            )
    return table("Predicted against measured", AGREEMENT_HEADINGS, cells, AGREEMENT_NOTE) if cells else ""


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def covariance_section(rows: Sequence[Row]) -> str:
    """Covariance of the top tokens: the paper's Table 1 over the steps."""
    labels = {key: label for label, key, _, _ in TABLE_1[1:]}
    chart = chart_of(
        rows, "Covariance of the top tokens", labels, note="mean of the share, logarithmic", log=True, no_headline=True
    )
    measured = [row for row in rows if row.get("cov/top50_mean") is not None]
    if chart is None or not measured:
        return ""
    first, last = measured[0], measured[-1]
    cells = []
    for label, mean_key, border_key, paper in TABLE_1:
        border = "–" if border_key is None or last.get(border_key) is None else number(last[border_key])
        values = ["–" if row.get(mean_key) is None else number(row[mean_key]) for row in (first, last)]
        cells.append((label, *values, border, number(paper)))
    headings = ("tokens", f"mean, step {first['step']}", f"mean, step {last['step']}", "begins at", "paper, step 1")
    note = (
        "Cov = (log π − mean)(A − mean) over all response tokens of the step. The paper's column is its Table 1 for "
        "Qwen2.5-7B; a share of fewer than one token is one token."
    )
    return f"<h2>Covariance</h2>{figures([chart])}{table('Covariance by share of tokens', headings, cells, note)}"


def control_section(rows: Sequence[Row]) -> str:
    """Regimes of the groups, K, and what a controller did."""
    regimes = {f"advantage/{name}_fraction": name for name in ("hard", "easy", "degenerate")}
    several = any(present(rows, key) for key in list(regimes)[:2])
    charts = [
        chart_of(rows, "Regimes of the groups", regimes, percent=True, stacked=True, no_headline=True)
        if several
        else None,
        _level_chart(rows),
        _by_source(rows, "reward/accuracy", "Training accuracy by data source", percent=True, bounds=(0.0, 1.0)),
        *_controller_charts(rows),
    ]
    parts = figures(charts)
    return f"<h2>Regimes, K and control</h2>{parts}" if parts else ""


def _by_source(rows: Sequence[Row], key: str, title: str, **options: object) -> Chart | None:
    """One line a data source; only where there are several."""
    names = sorted({name for row in rows for name in row if name.startswith(f"{key}/")})
    labels = {name: name.removeprefix(f"{key}/") for name in names[:NUM_COLORS]}
    if len(labels) < 2:
        return None
    if len(names) > NUM_COLORS:
        options["note"] = f"{NUM_COLORS} of {len(names)} sources"
    return chart_of(rows, title, labels, no_headline=True, **options)


def _level_chart(rows: Sequence[Row]) -> Chart | None:
    """K, where it changes or differs between data sources; a constant one stands among the settings."""
    sources = sorted({name for row in rows for name in row if name.startswith("advantage/K/")})[: NUM_COLORS - 1]
    if not sources and len(set(present(rows, "advantage/K"))) < 2:
        return None
    labels = {"advantage/K": "other sources" if sources else "K"}
    labels |= {name: name.removeprefix("advantage/K/") for name in sources}
    return chart_of(rows, "K", labels, from_zero=True, bounds=(0.0, 1.0), note="quantile level", no_headline=True)


def _controller_charts(rows: Sequence[Row]) -> list[Chart | None]:
    """What the controller saw, and a chart for every actuator's value and for the effect estimated of it."""
    actuators = sorted(
        {name.removeprefix(CONTROLLER_VALUE) for row in rows for name in row if name.startswith(CONTROLLER_VALUE)}
    )
    return [
        chart_of(rows, "Entropy as the controller sees it", {"controller/entropy_ema": "moving average"}, unit="nats"),
        chart_of(rows, "Controller's error", {"controller/error": "error"}, note="log of target by moving average"),
        *[
            chart_of(rows, f"Actuator {name}", {CONTROLLER_VALUE + name: "value"}, note="in force in the step")
            for name in actuators
        ],
        *[
            chart_of(
                rows,
                f"Effect of {name}",
                {f"controller/effect/{name}": "estimate"},
                note="nats per unit, by regression on what happened: a hint, no proof",
            )
            for name in actuators
        ],
        chart_of(
            rows,
            "Controller's hand-over",
            {"controller/active": "active actuator", "controller/saturated": "all at a bound (±1: high, low)"},
            note="rank from 0, −1 for none",
            no_headline=True,
        ),
    ]
