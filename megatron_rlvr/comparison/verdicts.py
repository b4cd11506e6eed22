"""Numbers as text, and which differences are clear: shared by the page, the table and the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.comparison.matrix import MIN_SEEDS, Matrix
from megatron_rlvr.comparison.results import MethodResult, Spread, clear_difference
from megatron_rlvr.entropy.law import MIN_SPAN
from megatron_rlvr.report.charts import number

PERCENT = ("accuracy_start", "accuracy_end", "accuracy_gain", "reward_end", "zero_share")
JUDGED = {
    "accuracy_end": "Held-out accuracy after training",
    "entropy_end": "Entropy at the end",
    "zero_share": "Share of responses with zero advantage",
    "length_end": "Response length at the end",
}
"""Quantities whose difference from the baseline is judged."""


def value_text(key: str, value: float) -> str:
    """A scalar as a reader wants it, e.g. ``41.2%``."""
    return f"{value * 100:.1f}%" if key in PERCENT else number(value)


def spread_text(key: str, spread: Spread) -> str:
    """Mean and sample standard deviation over seeds, e.g. ``41.2% ± 1.9``."""
    text = value_text(key, spread.mean)
    if spread.sd is None:
        return text
    return f"{text} ± {spread.sd * 100:.1f}" if key in PERCENT else f"{text} ± {number(spread.sd)}"


def difference_text(key: str, spread: Spread) -> str:
    """Mean difference with the ends of its 95% t interval, e.g. ``+3.1 [−0.4, +6.6] points``."""
    scale, unit = (100.0, " points") if key in PERCENT else (1.0, "")

    def signed(value: float) -> str:
        size = f"{abs(value) * scale:.1f}" if key in PERCENT else number(abs(value))
        return f"−{size}" if value < 0 and float(size.rstrip("kM").replace("−", "-")) else f"+{size}"

    if spread.half_width is None:
        return f"{signed(spread.mean)}{unit}"
    low, high = spread.mean - spread.half_width, spread.mean + spread.half_width
    return f"{signed(spread.mean)} [{signed(low)}, {signed(high)}]{unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the comparison says about one quantity."""

    key: str
    title: str
    clear: tuple[tuple[str, str], ...]
    """Label and difference of methods whose interval leaves out zero."""
    unclear: tuple[tuple[str, str], ...]
    """Those whose interval holds zero, or that have too few seeds for one."""


def verdicts(results: Sequence[MethodResult]) -> list[Verdict]:
    """One for every judged quantity that was measured."""
    found = []
    for key, title in JUDGED.items():
        judged = [(result, result.differences[key]) for result in results if key in result.differences]
        if judged:
            texts = [(r.method.label, difference_text(key, spread), clear_difference(spread)) for r, spread in judged]
            found.append(
                Verdict(
                    key=key,
                    title=title,
                    clear=tuple((label, text) for label, text, clear in texts if clear),
                    unclear=tuple((label, text) for label, text, clear in texts if not clear),
                )
            )
    return found


def caution(matrix: Matrix, results: Sequence[MethodResult]) -> str:
    """How much the intervals can carry."""
    judged = sum(len(v.clear) + len(v.unclear) for v in verdicts(results))
    num_seeds = min((len(result.cells) for result in results), default=0)
    few = f" Over fewer than {MIN_SEEDS} seeds none is called clear." if num_seeds < MIN_SEEDS else ""
    return (
        f"A difference is the mean over seeds of method minus {label_of(matrix, matrix.baseline)} under the same seed, "
        f"with its 95% t interval; it is called clear where the interval leaves out zero.{few} With so few seeds the "
        f"intervals are wide, and of {judged} such differences about {judged * 0.05:.0f} would look clear by chance "
        "alone. That a difference is not clear does not say that there is none."
    )


def label_of(matrix: Matrix, name: str) -> str:
    """The label of a method."""
    return next(method.label for method in matrix.methods if method.name == name)


COLUMNS = (
    "method",
    "seeds",
    "held-out accuracy, start",
    "end",
    "against the baseline",
    "entropy, end (nats)",
    "against the baseline",
    "zero advantage",
    "covariance",
    "law: ceiling",
    "law",
    "s a step",
    "s a run",
)


def table(results: Sequence[MethodResult]) -> list[tuple[str, ...]]:
    """A row a method, in the order of `COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for result in results:

        def cell(key: str, result: MethodResult = result) -> str:
            return spread_text(key, result.scalars[key]) if key in result.scalars else "–"

        def against(key: str, result: MethodResult = result) -> str:
            return difference_text(key, result.differences[key]) if key in result.differences else "–"

        fit = result.law.fit
        rows.append(
            (
                result.method.label,
                str(len(result.cells)),
                cell("accuracy_start"),
                cell("accuracy_end"),
                against("accuracy_end"),
                cell("entropy_end"),
                against("entropy_end"),
                cell("zero_share"),
                cell("cov"),
                # Where the entropy hardly moved, the ceiling is an extrapolation to nowhere.
                "–" if fit is None or fit.span < MIN_SPAN else f"{fit.ceiling:.1%} ± {fit.ceiling_se * 100:.1f}",
                result.law.verdict,
                cell("step_s"),
                cell("wall_s"),
            )
        )
    return rows
