"""Ranks end soon after another one is gone, in a collective or not, and say which."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import end_of_ranks

SCRIPT = Path(__file__).with_name("peer_rank.py")


def ends(case: str) -> list[tuple[int | None, str]]:
    started = time.monotonic()
    found = end_of_ranks(SCRIPT, [case], world_size=3, timeout_s=120)
    assert time.monotonic() - started < 100, "nobody waits for the 30 minutes of a collective"
    return found


@pytest.mark.parametrize(("case", "lost"), [("killed", 1), ("main killed", 0)])
def test_a_killed_rank_ends_the_others(case: str, lost: int) -> None:
    found = ends(case)
    for rank, (code, text) in enumerate(found):
        if rank == lost:
            assert code == -signal.SIGKILL
        else:
            assert code == 0, text
            assert re.search(rf"lost rank {lost}: trainer rank {lost} \(pid \d+ on \S+\) is gone", text), text


def test_a_rank_that_stands_still_ends_the_others() -> None:
    """One waits for rollouts, one in a collective, longer than the third is silent."""
    for rank, (code, text) in enumerate(ends("stalled")):
        if rank == 1:
            assert code == -signal.SIGKILL
        else:
            assert code == 0, text
            told = r"lost rank 1: trainer rank 1 \(pid \d+ on \S+\) stands still: no sign of it for 3 s"
            assert re.search(told, text), text


def test_a_rank_that_fails_alone_is_quoted() -> None:
    for rank, (code, text) in enumerate(ends("failed")):
        if rank == 1:
            assert code != 0
            assert "ArithmeticError: one and one is three" in text
        else:
            assert code == 0, text
            assert re.search(
                r"lost rank 1: trainer rank 1 .* failed: ArithmeticError: one and one is three$", text, re.M
            )


@pytest.mark.parametrize(("case", "text"), [("refused", "refused: all alike\n"), ("in order", "")])
def test_ranks_that_end_alike_lose_nobody(case: str, text: str) -> None:
    for code, output in ends(case):
        assert code == 0, output
        assert output.endswith(text)
        assert "lost" not in output
