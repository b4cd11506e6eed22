"""A request to stop while libraries are still being loaded: the run's own words, not those of a library in pieces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

COMMAND = [sys.executable, "-m", "tests.e2e.signalled_command"]
RANK = """
import os, time
print(os.environ["RANK"], flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize(
    ("number", "code", "words"), [("SIGTERM", 75, "stopped by SIGTERM"), ("SIGINT", 130, "stopped")]
)
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("torch._dynamo", ["train", "experiment=quickstart", "parallel.tp=1"]),
        ("megatron.core.models", ["train", "experiment=quickstart", "parallel.tp=1"]),
        ("torch.distributed.elastic", ["launch", "--standalone", "--nproc-per-node", "1", "-m", "this"]),
    ],
    ids=["rank in torch", "rank in megatron", "launcher"],
)
def test_while_a_library_is_imported(
    module: str, arguments: list[str], number: str, code: int, words: str, tmp_path: Path
) -> None:
    run = subprocess.run(
        [*COMMAND, module, number, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (run.returncode, run.stdout.splitlines()) == (code, [words])
    assert not list(tmp_path.glob("rlvr-*"))


def test_ranks_that_do_not_listen_yet(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "megatron_rlvr.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    with subprocess.Popen(
        launcher, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert {run.stdout.readline(), run.stdout.readline()} == {"0\n", "1\n"}
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=300)
    assert run.returncode == 75
    assert "stopped by SIGTERM" in said.splitlines(), said
    assert not list(tmp_path.glob("rlvr-*"))
