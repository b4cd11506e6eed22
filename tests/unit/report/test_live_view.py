import io

import pytest
from rich.console import Console as RichConsole

from megatron_rlvr.config.schema import Console
from megatron_rlvr.report import LiveView
from megatron_rlvr.report.live_view import clock, sparkline

METRICS = {
    "step": 1,
    "reward/mean": 0.25,
    "entropy/mean": 0.8125,
    "advantage/zero_fraction": 0.5,
    "response/length_mean": 12.25,
    "time/rollout_s": 3.0,
    "time/train_s": 1.0,
    "time/sync_s": 0.0,
    "grad_norm": None,
}


def captured(*, terminal: bool) -> RichConsole:
    return RichConsole(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def output(console: RichConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_every_step_is_one_line() -> None:
    console = captured(terminal=False)
    with LiveView(Console.auto, total_steps=4, experiment="e", console=console) as view:
        for step in (1, 2):
            with view.phase("rollout", total=2) as advance:
                advance()
                advance(1)
            view.update(METRICS | {"step": step})
    lines = output(console).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "step 1/4, reward 0.250, entropy 0.812, zero advantage 50%, response length 12.2, "
        "seconds: rollout 3.0 + train 1.0 + sync 0.0, elapsed "
    )
    assert ", left " not in lines[0]
    assert ", left 0:0" in lines[1]


def test_a_terminal_gets_the_table_the_trend_and_the_phase() -> None:
    console = captured(terminal=True)
    with LiveView(Console.auto, total_steps=4, experiment="quickstart", console=console) as view:
        view.note("servers are up")
        for step, reward in enumerate([0.0, 0.5, 1.0], start=1):
            view.update(METRICS | {"step": step, "reward/mean": reward})
        with view.phase("rollout", total=8) as advance:
            advance(3)
            view.update(METRICS | {"step": 4, "reward/mean": 0.5})
    text = output(console)
    for expected in ("quickstart", "servers are up", "step 4 of 4", "▁▅█▅", "0.500", "rollout", "3/8", "75%", "25%"):
        assert expected in text


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("mode", list(Console))
def test_nothing_is_swallowed_and_the_cursor_comes_back(mode: Console, interruption: type[BaseException]) -> None:
    console = captured(terminal=mode is Console.rich)
    view = LiveView(mode, total_steps=4, experiment="e", console=console)
    with pytest.raises(interruption), view, view.phase("train", total=2):
        raise interruption
    if mode is Console.rich:
        assert output(console).rstrip().endswith("\x1b[?25h")
    with view.phase("train") as advance:
        advance()


def test_a_resumed_run_counts_from_where_it_was() -> None:
    console = captured(terminal=True)
    with LiveView(Console.auto, total_steps=10, experiment="e", first_step=7, console=console):
        pass
    assert "step 7 of 10" in output(console)


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([2.0, 2.0], "▄▄"), ([0, 1, 2, 3], "▁▃▆█"), ([-1, 1], "▁█")]
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected
