"""One piece of work on a terminal and elsewhere."""

import io

from rich.console import Console

from megatron_rlvr.report.progress_bar import progress_bar


def shown(*, terminal):
    out = io.StringIO()
    with progress_bar(Console(file=out, force_terminal=terminal, width=100), "aime24", 3) as advance:
        advance(0)
        advance(1)
        advance(2)
    return out.getvalue()


def test_a_terminal_gets_a_bar_with_counts_and_time():
    text = shown(terminal=True)
    assert "aime24" in text
    assert "3/3" in text
    assert "left" in text


def test_elsewhere_the_end_is_a_line():
    assert shown(terminal=False).splitlines() == ["aime24: 3 of 3, 0 s"]
