"""The trainer's side of the rollout process.

Rollouts are generated in a process of their own, so that the training loop never waits for the interpreter lock
while thousands of responses are received, parsed and verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import DataConfig, EvalConfig, RewardConfig, RolloutConfig
from megatron_rlvr.rollout.messages import (
    Close,
    Command,
    Connect,
    Evaluate,
    Generate,
    Heartbeat,
    Hold,
    Initialize,
    LoadState,
    Message,
    Notice,
    Ping,
    Progress,
    Result,
    RolloutError,
    ServerTrouble,
    ServiceInfo,
    UseServers,
)
from megatron_rlvr.types import EvalBatch, RolloutBatch

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
CLOSE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
"""For commands that only touch state."""
SILENCE_S = 120.0
"""A process that sends not even a heartbeat for so long while it generates is stuck."""


class RolloutService:
    """Starts the rollout process and asks it for batches; one call at a time.

    A mistake in the settings or the data comes back as ValueError, everything else as `RolloutError` with the
    process's traceback; its warnings are logged here too. A process that dies is noticed at once, one that is stuck
    after `SILENCE_S`.

    Args:
        data, reward, rollout, evaluation: the parts of the run's configuration that concern rollouts.
        tokenizer_path: folder with the tokenizer.
        urls: servers to connect to in `start` (through `rollout.router_url` if set); empty when they are still
            starting, then `connect` follows.
        seed: of the data order and the sampling seeds.
        log_path: file that the process's output is appended to.

    Example:
        >>> with RolloutService(data=..., reward=..., rollout=..., evaluation=..., tokenizer_path="model",
        ...                     urls=["http://127.0.0.1:30000"], seed=0, log_path=Path("rollout.log")) as service:
        ...     service.start(timeout_s=120)
        ...     batch = service.generate(step=0, policy_version=0)
    """

    def __init__(
        self,
        *,
        data: DataConfig,
        reward: RewardConfig,
        rollout: RolloutConfig,
        evaluation: EvalConfig,
        tokenizer_path: str,
        urls: Sequence[str],
        seed: int,
        log_path: Path,
    ) -> None:
        self._initialize = Initialize(
            data=data,
            reward=reward,
            rollout=rollout,
            evaluation=evaluation,
            tokenizer_path=tokenizer_path,
            seed=seed,
        )
        self._urls = tuple(urls)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._pending: Command | None = None
        self._state: dict[str, Any] | None = None

    def __enter__(self) -> RolloutService:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self, timeout_s: float) -> ServiceInfo:
        """Starts the process and waits until data and verifiers are ready and the servers, if given, are reached.

        Raises:
            ValueError: a setting, a data file or the tokenizer is wrong.
            RolloutError: the process or a server failed, or it took longer than ``timeout_s`` seconds.
        """
        if self._process is not None:
            raise RuntimeError("the rollout process is already started")
        try:
            self._launch()
            info: ServiceInfo = self._call(self._initialize, timeout_s=timeout_s)
            if self._urls:
                self.connect(self._urls, router_url=self._initialize.rollout.router_url)
        except BaseException:
            self.close()
            raise
        return info

    def _launch(self) -> None:
        ours, theirs = Pipe(duplex=True)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "megatron_rlvr.rollout.worker"),
                    *("--fd", str(theirs.fileno()), "--trainer-pid", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    # what the trainer can import, such as a reward by dotted path, can be imported there
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    # some reasoning-gym families iterate over sets of strings: a fixed hash seed makes them repeat
                    "PYTHONHASHSEED": "0",
                },
                # Its own group: Ctrl-C does not reach it, and its verifiers can be ended with it.
                start_new_session=True,
            )
        self._connection = ours

    def connect(self, urls: Sequence[str], *, router_url: str | None = None) -> None:
        """Uses these servers from now on; they hold the trainer's weights.

        While responses are under way those at servers that stay go on, and nothing is waited for.

        Args:
            urls: base URLs of the servers.
            router_url: router before them, if there is one; generation goes through it.

        Raises:
            RolloutError: one cannot be reached; names it and the reason.
        """
        if self._pending is None:
            self._call(Connect(urls=tuple(urls), router_url=router_url), timeout_s=CONNECT_TIMEOUT_S)
        else:
            self._send(UseServers(urls=tuple(urls), router_url=router_url))

    def use(self, urls: Sequence[str], *, router_url: str | None = None) -> None:
        """As `connect`, of servers that have just answered: they are not asked, and nothing is waited for."""
        self._send(UseServers(urls=tuple(urls), router_url=router_url))

    @property
    def busy(self) -> bool:
        """Whether something that was begun has not been answered yet."""
        return self._pending is not None

    def hold(self, held: bool) -> None:
        """Says that a weight sync holds the servers while responses are under way: their silence is no fault."""
        self._send(Hold(held=held))

    def generate(self, *, step: int, policy_version: int, on_progress: OnProgress | None = None) -> RolloutBatch:
        """The rollouts of one step; see `RolloutGenerator.generate`."""
        self.generate_async(step=step, policy_version=policy_version)
        return self.result(on_progress)

    def generate_async(self, *, step: int, policy_version: int) -> None:
        """Begins the rollouts of one step; `result` waits for them."""
        self._submit(Generate(step=step, policy_version=policy_version))

    def result(self, on_progress: OnProgress | None = None) -> RolloutBatch:
        """The batch that `generate_async` began."""
        if not isinstance(self._pending, Generate):
            raise RuntimeError("no rollouts are under way: generate_async comes before result")
        while isinstance(answer := self.wait(on_progress), ServerTrouble):
            logger.warning("server %s %s", answer.url, answer.reason)
        assert isinstance(answer, RolloutBatch)
        return answer

    def wait(
        self, on_progress: OnProgress | None = None, on_beat: Callable[[], None] | None = None
    ) -> RolloutBatch | EvalBatch | ServerTrouble:
        """What `generate_async` or `evaluate_async` began, or before it the trouble of a server.

        Trouble is told again and again while it lasts; after it `wait` is called again.

        Args:
            on_progress: told how far it is.
            on_beat: called every few seconds, whatever happens; what it raises ends the wait.
        """
        if self._pending is None:
            raise RuntimeError("nothing is under way: generate_async or evaluate_async comes before wait")
        return self._answer(on_progress, timeout_s=None, on_beat=on_beat)

    def evaluate(
        self,
        *,
        policy_version: int,
        max_problems: int | None = None,
        key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> EvalBatch:
        """Answers to the held-out problems, or to the set of that key; see `RolloutGenerator.evaluate`."""
        self.evaluate_async(policy_version=policy_version, max_problems=max_problems, key=key)
        while isinstance(answer := self.wait(on_progress), ServerTrouble):
            logger.warning("server %s %s", answer.url, answer.reason)
        assert isinstance(answer, EvalBatch)
        return answer

    def evaluate_async(self, *, policy_version: int, max_problems: int | None = None, key: str | None = None) -> None:
        """Begins an evaluation; `wait` waits for it."""
        self._submit(Evaluate(policy_version=policy_version, max_problems=max_problems, key=key))

    def state_dict(self) -> dict[str, Any]:
        """Data order and surplus groups as of the last batch handed out; it pickles.

        Rollouts still under way do not show in it: a run that continues from it generates them again.
        """
        if self._state is None:
            raise RuntimeError("the rollout process must be started before its state is read")
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state that `state_dict` gave."""
        self._call(LoadState(state=state), timeout_s=ANSWER_TIMEOUT_S)

    def ping(self) -> int:
        """The id of the rollout process, from itself."""
        pid: int = self._call(Ping(), timeout_s=ANSWER_TIMEOUT_S)
        return pid

    def close(self) -> None:
        """Ends the process and its verifiers; safe to call twice and while rollouts are under way."""
        if self._process is None:
            return
        assert self._connection is not None
        with contextlib.suppress(OSError):
            self._connection.send(Close())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._kill_group()
        self._process.wait()
        self._connection.close()
        self._process = self._connection = self._pending = None

    # messages

    def _call(self, command: Command, *, timeout_s: float) -> Any:
        self._submit(command)
        return self._answer(None, timeout_s=timeout_s)

    def _submit(self, command: Command) -> None:
        if self._pending is not None:
            raise RuntimeError(f"{type(self._pending).__name__} is still under way: result() comes first")
        self._send(command)
        self._pending = command

    def _send(self, command: Command) -> None:
        if self._connection is None:
            raise RuntimeError("the rollout process is not started")
        try:
            self._connection.send(command)
        except OSError:
            raise self._death() from None

    def _answer(
        self,
        on_progress: OnProgress | None,
        *,
        timeout_s: float | None,
        on_beat: Callable[[], None] | None = None,
    ) -> Any:
        """The value of the command under way, within ``timeout_s`` if given, else as long as the process is alive."""
        command = type(self._pending).__name__
        deadline = time.monotonic() + (SILENCE_S if timeout_s is None else timeout_s)
        while (message := self._receive(deadline)) is not None:
            if isinstance(message, Progress | Heartbeat | Notice):
                if timeout_s is None:
                    deadline = time.monotonic() + SILENCE_S
                if isinstance(message, Heartbeat) and on_beat is not None:
                    on_beat()
                elif isinstance(message, Notice):
                    logger.warning("%s", message.text)
                elif isinstance(message, Progress) and on_progress is not None:
                    on_progress(message)
                continue
            if isinstance(message, ServerTrouble):
                if timeout_s is None:
                    return message
                continue  # of rollouts that have ended
            self._pending = None
            if isinstance(message, Result):
                self._state = message.state
                return message.value
            if message.user_mistake:
                raise ValueError(message.error)
            if message.foreseen:
                raise RolloutError(message.error)
            raise RolloutError(f"{message.error}\n--- traceback of the rollout process ---\n{message.traceback}")
        self.close()
        what = f"sent nothing for {SILENCE_S:g} s" if timeout_s is None else f"took longer than {timeout_s:g} s"
        raise RolloutError(f"the rollout process {what} in {command} and was ended; its output: {self._log_path}")

    def _receive(self, deadline: float) -> Message | None:
        """The next message, or None when the deadline (monotonic seconds) has passed."""
        assert self._connection is not None
        assert self._process is not None
        while not self._connection.poll(0.2):
            # The end of file below tells of most deaths; this of one whose socket lives on in a child of it.
            if self._process.poll() is not None and not self._connection.poll():
                raise self._death()
            if time.monotonic() > deadline:
                return None
        try:
            message: Message = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        return message

    def _death(self) -> RolloutError:
        """The error that tells how the process ended; ends what it may have left."""
        assert self._process is not None
        self._kill_group()
        code = self._process.wait()
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        lines = self._log_path.read_text(errors="replace").splitlines()[-20:]
        return RolloutError("\n".join([f"the rollout process {how}; the end of {self._log_path}:", *lines]))

    def _kill_group(self) -> None:
        """Kills the process and the verifiers it has started, whether it still lives or not."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
