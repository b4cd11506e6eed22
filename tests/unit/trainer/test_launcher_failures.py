"""What the launcher makes of ranks that failed: the reason of the first, not what its end did to the others."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rlvr.launch import Launcher

KILLED, STOPPED, FAILED, MISTAKE = -signal.SIGKILL, 75, 1, 2


@pytest.mark.parametrize(
    ("codes", "silent", "passed_on", "code", "words"),
    [
        (
            [KILLED, STOPPED],
            [0],
            [],
            137,
            "error: trainer rank 0 (pid 100) was killed by SIGKILL; the others were ended",
        ),
        ([KILLED, -signal.SIGTERM], [0, 1], [], 137, "error: trainer rank 0 (pid 100) was killed by SIGKILL"),
        ([KILLED, FAILED], [0], [], FAILED, ""),
        ([MISTAKE, STOPPED], [], [], MISTAKE, ""),
        ([MISTAKE, KILLED], [1], [], MISTAKE, ""),
        ([STOPPED, STOPPED], [], [signal.SIGTERM], STOPPED, ""),
        ([-signal.SIGTERM, STOPPED], [0], [signal.SIGTERM], STOPPED, "stopped by SIGTERM"),
        ([-signal.SIGUSR1, -signal.SIGUSR1], [0, 1], [signal.SIGUSR1], STOPPED, "stopped by SIGUSR1"),
    ],
)
def test_the_first_reason_counts(
    codes: list[int], silent: list[int], passed_on: list[int], code: int, words: str,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failures = {}
    for rank, exitcode in enumerate(codes):
        error_file = tmp_path / f"{rank}.json"
        if rank not in silent:
            error_file.write_text("{}")
        failures[rank] = SimpleNamespace(
            exitcode=exitcode, timestamp=rank, pid=100 + rank, error_file=str(error_file), local_rank=rank
        )
    launcher = Launcher()
    launcher._passed_on.update(passed_on)
    assert launcher._tell_failure(failures) == code  # type: ignore[arg-type]
    said = capfd.readouterr().err
    assert words in said if words else said == ""
