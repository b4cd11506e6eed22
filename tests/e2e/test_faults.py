"""Real trainings that lose a server, then a trainer rank, and that are stopped before they train."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlvr.config.compose import load_config
from megatron_rlvr.rollout.discovery import FleetStatus, read_status
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.wire import WireError, request
from megatron_rlvr.trainer.warm_cache import WarmCacheEntry, cache_key
from tests.conftest import RealServer
from tests.e2e.runs import assert_servers_agree, family, outliving, start

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
PATIENCE_S = 400.0
END_S = 90.0
"""For a run to end on a machine that is busy; seconds when it is not."""


class Run:
    """A run under way, its output line by line."""

    def __init__(self, overrides: Sequence[str], *, ranks: int) -> None:
        self.process, self.mark = start(overrides, ranks=ranks)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def await_line(self, pattern: str) -> str:
        """The first line that matches, now or later."""
        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while not (found := [line for line in self.lines if re.search(pattern, line)]):
                assert self.process.poll() is None, self.output
                assert time.monotonic() < deadline, self.output
                self._news.wait(1.0)
        return found[0]

    def step(self) -> int:
        """The last step that has ended."""
        done = [int(found[1]) for line in self.lines if (found := re.match(r"step (\d+)/", line))]
        return max(done, default=0)

    def rank(self, number: int) -> psutil.Process:
        """The process of a trainer rank."""
        [found] = [
            process
            for process in family(self.mark)
            if process.environ().get("RANK") == str(number) and "megatron_rlvr.train" in process.cmdline()
        ]
        return found

    def end(self) -> int:
        """The exit code, soon."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {END_S:g} s:\n{self.output}") from None
        finally:
            self._reader.join(5.0)

    def sweep(self) -> list[str]:
        """Ends what is left; command lines of what outlived the run."""
        self.process.kill()
        self.process.wait()
        left = outliving(self.mark)
        told = [" ".join(process.cmdline()) for process in left]
        for process in left:
            process.kill()
        return told


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_silent(url: str) -> bool:
    """Whether nobody listens there any more."""
    try:
        request(url, "GET", "/health", timeout_s=2.0)
    except WireError:
        return True
    return False


def training(model: Path, out: Path) -> list[str]:
    return [
        *("experiment=quickstart", "warm_start.enabled=false"),
        *(f"model.path={model}", f"output_dir={out}", "run_name=run", "data.max_prompt_tokens=256"),
        *("data.val_size=4", "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_response_tokens=48"),
        *("rollout.server.max_total_tokens=4096", "rollout.server.max_running_requests=16", "advantage=grpo"),
        *("reward.verifier=tests.e2e.rewards:share_of_low_bytes", "reward.binary=false", "optim.lr=1e-3"),
        *("train.steps=100000", "eval.at_start=false", "eval.every=0", "train.save_hf=false", "logging.console=plain"),
    ]


def test_a_run_survives_its_server_and_ends_with_its_rank(tiny_qwen3: Path, tmp_path: Path) -> None:
    run = Run(training(tiny_qwen3, tmp_path), ranks=2)
    folder = tmp_path / "quickstart" / "run"
    try:
        run.await_line(r"^step 2/")
        before = status(folder)
        [server] = before.servers
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        killed_in = run.step() + 1
        run.await_line(rf"^step {killed_in + 2}/")
        [again] = status(folder).servers
        assert (again.restarts, again.pid != server.pid) == (1, True)

        os.kill(run.rank(1).pid, signal.SIGKILL)
        assert run.end() not in (0, None)
    finally:
        left = run.sweep()
    assert left == []
    assert re.search(r"trainer rank 1 \(pid \d+ on \S+\) is gone", run.lines[-1]), run.output
    assert "Traceback" not in run.output
    assert is_silent(again.url)
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step once"
    assert len(rows) >= killed_in + 2
    # Also right after the server came back, with the weights it was started with: it got the trainer's first.
    assert_servers_agree(rows)
    assert all(row["rollout/num_responses"] == 16 for row in rows), "no response is missing"


def status(folder: Path) -> FleetStatus:
    found = read_status(folder / "servers")
    assert found is not None
    return found


def assert_stopped(run: Run, left: list[str]) -> None:
    """It ended with the word of it, and left nothing."""
    assert left == []
    assert "Traceback" not in run.output, run.output
    assert run.lines[-1].startswith("stopped"), run.output


def test_ctrl_c_while_servers_start(tiny_qwen3: Path, tmp_path: Path) -> None:
    run = Run(training(tiny_qwen3, tmp_path), ranks=2)
    try:
        run.await_line("world size 2")
        run.process.send_signal(signal.SIGINT)
        code = run.end()
    finally:
        left = run.sweep()
    assert code == 130, run.output
    assert_stopped(run, left)


def test_stopped_in_the_warm_start(real_server: RealServer, tmp_path: Path) -> None:
    """One that waited for another run's first. Nothing is half done, and the next run does not wait for it."""
    cache = tmp_path / "cache"
    overrides = [
        *training(real_server.model, tmp_path),
        "model.scratch=null",
        "warm_start.enabled=true",
        f"warm_start.cache_dir={cache}",
    ]
    overrides += [f"rollout.urls=[{real_server.url}]", "rollout.server.max_total_tokens=null"]
    overrides += ["rollout.server.max_running_requests=null", "warm_start.target_accuracy=1"]
    # The signal comes right after the first check, into the training: five steps of these take seconds.
    overrides += ["warm_start.check_every=5", "warm_start.batch_size=512"]
    entry = WarmCacheEntry(cache / cache_key(load_config(overrides)))
    assert entry.claim()
    engine = HttpEngine(real_server.url, num_ranks=real_server.info.num_ranks, timeout_s=60)
    run = Run(overrides, ranks=2)
    try:
        run.await_line(rf"another run \(process {os.getpid()} on .*\) makes this warm start: waiting for it")
        entry.release()
        run.await_line("warm start: step 5,")
        run.process.send_signal(signal.SIGTERM)
        code = run.end()
    finally:
        left = run.sweep()
        engine.resume()
        engine.update_from_disk(str(real_server.model), weight_version=0)
    assert code == 75, run.output
    assert_stopped(run, left)
    assert json.loads((tmp_path / "quickstart" / "run" / "status.json").read_text())["state"] == "stopped"
    assert entry.finished is None
    assert entry.claim()
    entry.release()
    assert [path.name for path in entry.folder.iterdir()] == ["maker.txt"]
