"""What a person sees while a run goes on: a live table on a terminal, a line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from megatron_rlvr.config.schema import Console

TREND_STEPS = 32
"""Steps in a trend line and behind the estimate of the time left."""
QUIET_S = 30.0
"""Without a terminal, a phase says how far it is at most this often."""
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Shown:
    """A metric of the table."""

    key: str
    label: str
    form: str
    """Format specification of the value."""
    unit: str = ""


SHOWN = (
    Shown("reward/mean", "reward", ".3f"),
    Shown("eval/accuracy", "held-out accuracy", ".1%"),
    Shown("entropy/mean", "entropy", ".3f", "nats"),
    Shown("advantage/zero_fraction", "zero advantage", ".0%"),
    Shown("response/length_mean", "response length", ".1f", "tokens"),
    Shown("rollout/logprob_diff_max", "engine log-prob gap", ".1e", "max"),
    Shown("tokens_per_s", "throughput", ",.0f", "tokens/s"),
)
TIMES = (("time/rollout_s", "rollout", "cyan"), ("time/train_s", "train", "magenta"), ("time/sync_s", "sync", "yellow"))


class LiveView:
    """Progress of a run, on one process of it.

    A context manager that neither swallows an exception nor Ctrl-C: the terminal is set right and both go on.

    Example:
        >>> with LiveView(Console.auto, total_steps=100, experiment="quickstart") as view:
        ...     for step in range(1, 101):
        ...         with view.phase("rollout", total=128) as advance:
        ...             ...  # advance() for every response, or advance(8)
        ...         view.update({"step": step, "reward/mean": 0.4})

    Args:
        mode: ``rich`` for the table, ``plain`` for lines, ``auto`` by whether standard output is a terminal.
        total_steps: Rollout steps of the whole run.
        experiment: Its name.
        first_step: Steps that a resumed run had done before.
        console: Where to write; standard output when None.
    """

    def __init__(
        self,
        mode: Console,
        total_steps: int,
        experiment: str,
        *,
        first_step: int = 0,
        console: RichConsole | None = None,
    ) -> None:
        if console is None:
            console = RichConsole(file=sys.stdout, force_terminal=True if mode is Console.rich else None)
        self._console = console
        self._rich = mode is Console.rich or (mode is Console.auto and console.is_terminal)
        self._total_steps = total_steps
        self._experiment = experiment
        self._step = self._first_step = first_step
        self._started = time.monotonic()
        self._step_ends: deque[float] = deque(maxlen=TREND_STEPS)
        self._history: dict[str, deque[float]] = {}
        self._latest: dict[str, float] = {}
        self._phases = Progress(
            TextColumn("  [bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        if self._rich:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Shows a bar while the block runs.

        Args:
            name: ``rollout``, ``train`` and the like.
            total: Units of work; None where it is not known, then the bar only moves.

        Yields:
            ``advance(count=1)``, which may be called from any thread.
        """
        if self._live is None:
            yield _SparseLines(self, name, total).advance
            return
        task = self._phases.add_task(name, total=total)
        try:
            yield lambda count=1: self._phases.advance(task, count)
        finally:
            self._phases.remove_task(task)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Takes in the metrics of a finished step (those written to ``metrics.jsonl``)."""
        for key, value in metrics.items():
            if isinstance(value, int | float) and value == value:
                self._latest[key] = value
                self._history.setdefault(key, deque(maxlen=TREND_STEPS)).append(value)
        self._step = int(metrics["step"])
        self._step_ends.append(time.monotonic())
        if self._live is None:
            self.note(self._plain_line(metrics))
        else:
            self._live.refresh()

    def note(self, text: str) -> None:
        """Prints a line above the table, or just prints it."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _remaining_s(self) -> float | None:
        # From the second step on: what came before the first one's end is start-up.
        timed = len(self._step_ends) - 1
        if timed < 1:
            return None
        per_step = (self._step_ends[-1] - self._step_ends[0]) / timed
        return per_step * (self._total_steps - self._step)

    def _plain_line(self, metrics: Mapping[str, Any]) -> str:
        parts = [f"step {self._step}/{self._total_steps}"]
        for shown in SHOWN:
            if metrics.get(shown.key) is not None:
                parts.append(f"{shown.label} {format(metrics[shown.key], shown.form)}")
        times = [f"{name} {metrics[key]:.1f}" for key, name, _ in TIMES if metrics.get(key) is not None]
        if times:
            parts.append(f"seconds: {' + '.join(times)}")
        remaining = self._remaining_s()
        parts.append(f"elapsed {clock(time.monotonic() - self._started)}")
        if remaining is not None:
            parts.append(f"left {clock(remaining)}")
        return ", ".join(parts)

    def _render(self) -> RenderableType:
        remaining = self._remaining_s()
        heading = Table.grid(expand=True, padding=(0, 1))
        heading.add_column(ratio=1)
        heading.add_column(justify="right", no_wrap=True)
        heading.add_row(
            Text.assemble(("step ", "dim"), (str(self._step), "bold"), (f" of {self._total_steps}", "dim")),
            Text.assemble(
                ("elapsed ", "dim"),
                clock(time.monotonic() - self._started),
                ("   left ", "dim"),
                "…" if remaining is None else clock(remaining),
            ),
        )
        overall = Progress(BarColumn(bar_width=None), expand=True)
        overall.add_task("steps", total=self._total_steps, completed=self._step)
        parts: list[RenderableType] = [heading, overall]
        table = self._metric_table()
        if table.row_count:
            parts += [Text(), table]
        if self._phases.tasks:
            parts += [Text(), self._phases]
        return Panel(Group(*parts), title=f"[bold]{self._experiment}", title_align="left", border_style="dim")

    def _metric_table(self) -> Table:
        table = Table.grid(expand=True, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", style="bold", no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, style="cyan", no_wrap=True, overflow="crop")
        for shown in SHOWN:
            if shown.key in self._latest:
                value = format(self._latest[shown.key], shown.form)
                table.add_row(shown.label, value, shown.unit, sparkline(self._history[shown.key]))
        times = [(name, style, self._latest[key]) for key, name, style in TIMES if key in self._latest]
        total = sum(seconds for *_, seconds in times)
        if total > 0:
            table.add_row("step time", f"{total:.1f}", "s", _split_bar(times, total))
        return table


class _SparseLines:
    """A phase without a terminal: a line now and then, none for a short phase."""

    def __init__(self, view: LiveView, name: str, total: int | None) -> None:
        self._view = view
        self._name = name
        self._total = total
        self._done = 0
        self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= QUIET_S:
            self._said = now
            of = "" if self._total is None else f"/{self._total}"
            self._view.note(f"  {self._name} {self._done}{of}")


def sparkline(values: Iterator[float] | deque[float] | list[float]) -> str:
    """A trend as block characters, lowest value to highest.

    Example:
        >>> sparkline([0, 1, 2, 3])
        '▁▃▆█'
    """
    numbers = list(values)
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    if low == high:
        return BLOCKS[3] * len(numbers)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((value - low) / (high - low) * top)] for value in numbers)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    Example:
        >>> clock(3725)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _split_bar(times: list[tuple[str, str, float]], total: float, width: int = 24) -> Text:
    """The share of every part of a step as a bar with its names."""
    bar = Text()
    for _, style, seconds in times:
        bar.append("█" * round(seconds / total * width), style=style)
    for name, style, seconds in times:
        bar.append(f"  {name} ", style=style).append(f"{seconds / total:.0%}")
    return bar
