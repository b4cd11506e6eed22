"""Verification in worker processes with a hard wall-clock limit.

math-verify hangs on tower powers, huge factorials and deep parentheses, inside C code that no signal handler
interrupts; so a verification that runs too long is killed with its process, and a new process takes its place. Every
such loss has a status of its own and is counted: silence is never scored as 0.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from dataclasses import dataclass, field

from megatron_rlvr.config.schema import RewardConfig
from megatron_rlvr.reward import worker as wire
from megatron_rlvr.reward.verifiers import check_verifier_name
from megatron_rlvr.types import Prompt, Score, VerifierStatus

logger = logging.getLogger(__name__)

_STARTUP_LIMIT_S = 120.0
"""For the imports of a worker on a busy machine."""
_START_ATTEMPTS = 3
_PIPELINED_S = 0.01
"""Cheap verifications are sent ahead to a worker, about this much work, to save the round trip."""
_MAX_PIPELINED = 64
_STALL_S = 0.2
"""A verification that takes longer gives the ones sent behind it to other workers."""
_GRACE_S = 0.05
"""For an answer that came in time while the event loop was busy."""
_STATUS = {
    wire.OK: VerifierStatus.ok,
    wire.UNPARSABLE: VerifierStatus.unparsable,
    wire.CRASH: VerifierStatus.crash,
}
_BOOT = "import sys; sys.path[:] = {path!r}; from megatron_rlvr.reward.worker import main; main{arguments!r}"


class VerifierPoolError(RuntimeError):
    """The pool cannot verify: no process comes up, or it was closed."""


@dataclass(slots=True, eq=False)
class _Job:
    request: bytes
    verdict: asyncio.Future[tuple[VerifierStatus, float, str]]
    copies: int = 0
    """Places that will settle it: the queue, and workers it was sent to."""


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: deque[_Job] = field(default_factory=deque)
    """In the order of their answers; the first one is being verified."""
    mean_s: float = _PIPELINED_S
    """Running mean of a verification, seconds."""

    @property
    def depth(self) -> int:
        """How many jobs to have at the worker at once."""
        return min(_MAX_PIPELINED, max(1, int(_PIPELINED_S / max(self.mean_s, 1e-6))))


class VerifierPool:
    """Scores responses in `num_workers` processes.

    Example:
        >>> async with VerifierPool(config.reward) as pool:
        ...     score = await pool.score(prompt, "The answer is \\\\boxed{4}.")
        >>> score.correctness, score.status
        (1.0, <VerifierStatus.ok: 'ok'>)
    """

    def __init__(self, config: RewardConfig) -> None:
        """Checks the options; processes start with `start` or the first `score`.

        Raises:
            ValueError: an unknown verifier, or a number out of range.
        """
        check_verifier_name(config.verifier)
        if config.num_workers < 1:
            raise ValueError(f"reward.num_workers must be at least 1, got {config.num_workers}")
        if not config.timeout_s > 0:
            raise ValueError(f"reward.timeout_s must be positive, got {config.timeout_s}")
        if config.memory_limit_mb < 1:
            raise ValueError(f"reward.memory_limit_mb must be at least 1, got {config.memory_limit_mb}")
        self._config = config
        self.counts: Counter[VerifierStatus] = Counter()
        """Verdicts so far by status."""
        self.num_restarts = 0
        """Workers replaced so far."""
        self._pending: deque[_Job] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._slots: list[asyncio.Task[None]] = []
        self._workers: set[_Worker] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()
        """Every child not yet waited for."""
        self._loaded = asyncio.Event()
        self._unsettled: set[_Job] = set()
        self._failure: Exception | None = None

    async def __aenter__(self) -> VerifierPool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._workers]

    async def start(self) -> None:
        """Starts the workers and waits until the first one has loaded the verifier.

        The kernel ends the workers with the thread that starts them: run the event loop in one that lives as long.

        Raises:
            ValueError: the verifier cannot be loaded.
            VerifierPoolError: no process comes up, or the pool is closed.
        """
        self._check_usable()
        self._begin()
        await self._loaded.wait()
        self._check_usable()

    async def score(self, prompt: Prompt, text: str) -> Score:
        """The verdict on one response.

        Args:
            prompt: the problem; sent to the worker as a pickle.
            text: the response.

        Raises:
            VerifierPoolError: the pool is closed or its workers do not start.
        """
        self._check_usable()
        self._begin()
        request = pickle.dumps((text, prompt), protocol=pickle.HIGHEST_PROTOCOL)
        job = _Job(request=request, verdict=asyncio.get_running_loop().create_future())
        self._unsettled.add(job)
        self._enqueue(job)
        try:
            status, raw, detail = await job.verdict
        finally:
            self._unsettled.discard(job)
        self.counts[status] += 1
        correctness = float(status is VerifierStatus.ok and raw >= self._config.threshold)
        reward = correctness if self._config.binary else raw
        return Score(correctness=correctness, reward=reward, status=status, detail=detail)

    async def close(self) -> None:
        """Kills the workers and waits for their end; a `score` still waiting raises. Can be called again."""
        if self._failure is None:
            self._failure = VerifierPoolError("the verifier pool is closed")
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        self._slots = []
        self._fail_unsettled()
        while self._processes:  # those whose slot was cancelled while ending them
            process = self._processes.pop()
            _kill(process)
            await asyncio.to_thread(process.wait)

    def _begin(self) -> None:
        if not self._slots:
            self._slots = [asyncio.create_task(self._serve_slot()) for _ in range(self._config.num_workers)]

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise _copy(self._failure)

    def _enqueue(self, job: _Job, *, first: bool = False) -> None:
        job.copies += 1
        if first:
            self._pending.appendleft(job)
        else:
            self._pending.append(job)
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _fail_unsettled(self) -> None:
        for job in self._unsettled:
            if not job.verdict.done():
                assert self._failure is not None, "jobs fail only with the pool"
                job.verdict.set_exception(_copy(self._failure))

    async def _serve_slot(self) -> None:
        """One worker after the other, for as long as the pool lives."""
        try:
            while True:
                worker = await self._start_worker()
                self._workers.add(worker)
                self._loaded.set()
                try:
                    await self._drive(worker)
                finally:
                    self._workers.discard(worker)
                    await self._end(worker)
                self.num_restarts += 1
        except Exception as error:  # noqa: BLE001 - a slot that ended unnoticed would leave its scores waiting forever
            if self._failure is None:
                self._failure = error if isinstance(error, ValueError) else VerifierPoolError(str(error))
            self._loaded.set()
            self._fail_unsettled()

    async def _start_worker(self) -> _Worker:
        """A worker that has loaded the verifier.

        Raises:
            ValueError: the verifier cannot be loaded.
            VerifierPoolError: no process comes up.
        """
        reason = ""
        for _ in range(_START_ATTEMPTS):
            worker = await self._launch()
            ready = False
            try:
                kind, _, _, _, detail = await _read_reply(worker.reader, _STARTUP_LIMIT_S)
                ready = kind == wire.READY
                if ready:
                    return worker
                raise ValueError(f"reward.verifier {self._config.verifier!r} cannot be loaded: {detail}")
            except TimeoutError:
                reason = f"it did not load the verifier within {_STARTUP_LIMIT_S:.0f} s"
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._end(worker)
                reason = f"it ended with {_exit_name(worker.process)} while loading the verifier"
            finally:
                if not ready:
                    await self._end(worker)
        raise VerifierPoolError(f"no verifier process comes up in {_START_ATTEMPTS} attempts: {reason}")

    async def _drive(self, worker: _Worker) -> None:
        """Feeds one worker and settles its jobs; returns when it has to be replaced."""
        while True:
            while not worker.sent and not self._pending:
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(waiter)
                await waiter
            if not worker.sent and worker.process.poll() is not None:
                logger.warning("an idle verifier ended with %s and is replaced", _exit_name(worker.process))
                return
            self._send_ahead(worker)
            if not worker.sent:
                continue  # every pending job was settled or abandoned meanwhile
            status, lost, detail = await self._settle_first(worker)
            if lost:
                logger.warning("a verifier is replaced after a %s: %s", status.value, detail)
                for job in reversed(worker.sent):
                    job.copies -= 1
                    if job.copies == 0 and not job.verdict.done():
                        self._enqueue(job, first=True)
                return

    def _send_ahead(self, worker: _Worker) -> None:
        while self._pending and len(worker.sent) < worker.depth:
            job = self._pending.popleft()
            if not job.verdict.done():
                worker.sent.append(job)
                worker.writer.write(job.request)

    def _share_waiting(self, worker: _Worker) -> None:
        """Offers the jobs behind a slow one to other workers too; the first verdict counts."""
        for job in list(worker.sent)[:0:-1]:
            if job.copies == 1 and not job.verdict.done():
                self._enqueue(job, first=True)

    async def _settle_first(self, worker: _Worker) -> tuple[VerifierStatus, bool, str]:
        """Waits for the verdict on the worker's first job; (status, whether the worker is lost, detail)."""
        try:
            reply = await self._await_reply(worker)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._end(worker)
            status, lost, score = VerifierStatus.crash, True, 0.0
            detail = f"the worker ended with {_exit_name(worker.process)}"
        else:
            if reply is None:
                status, lost, score = VerifierStatus.timeout, True, 0.0
                detail = f"no verdict within reward.timeout_s = {self._config.timeout_s:g} s"
            else:
                kind, lost, score, seconds, detail = reply
                status = _STATUS[kind]
                worker.mean_s += (seconds - worker.mean_s) * 0.1
        job = worker.sent.popleft()
        job.copies -= 1
        if not job.verdict.done():
            job.verdict.set_result((status, score, detail))
        return status, lost, detail

    async def _await_reply(self, worker: _Worker) -> tuple[int, bool, float, float, str] | None:
        """The worker's next answer; None when the first job's time is over."""
        limit = self._config.timeout_s
        stall = min(_STALL_S, limit)
        try:
            return await _read_reply(worker.reader, stall)
        except TimeoutError:
            self._share_waiting(worker)
        for wait in (limit - stall, _GRACE_S):
            try:
                return await _read_reply(worker.reader, wait)
            except TimeoutError:
                continue
        return None

    async def _launch(self) -> _Worker:
        """Starts a worker in a session of its own (Ctrl-C is for the pool), tied to this process's life."""
        ours, theirs = socket.socketpair()
        arguments = (theirs.fileno(), os.getpid(), self._config.verifier, self._config.memory_limit_mb)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(path=sys.path, arguments=arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            ours.close()
            raise VerifierPoolError(f"no verifier process comes up: {error}") from error
        finally:
            theirs.close()
        self._processes.add(process)
        reader, writer = await asyncio.open_connection(sock=ours)
        return _Worker(process=process, reader=reader, writer=writer)

    async def _end(self, worker: _Worker) -> None:
        """Kills a worker with everything it started and waits until it is gone."""
        worker.writer.close()
        _kill(worker.process)
        # Freeing the memory of a runaway verifier can take a while: not on the event loop.
        await asyncio.to_thread(worker.process.wait)
        self._processes.discard(worker.process)


async def _read_reply(reader: asyncio.StreamReader, limit_s: float) -> tuple[int, bool, float, float, str]:
    """(kind, whether the worker leaves, score, seconds, detail) of one answer that begins within `limit_s`."""
    async with asyncio.timeout(limit_s):
        header = await reader.readexactly(wire.REPLY.size)
    kind, leaves, score, seconds, length = wire.REPLY.unpack(header)
    # Not under the limit: the worker has sent it already, and a header must not be lost.
    detail = (await reader.readexactly(length)).decode() if length else ""
    return kind, leaves, score, seconds, detail


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself in between


def _exit_name(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _copy(error: Exception) -> Exception:
    """A fresh exception for each waiter: one instance raised twice would pile up tracebacks."""
    return type(error)(str(error))
