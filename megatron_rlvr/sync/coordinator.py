"""One weight sync from start to end, as a transaction: engines serve the old version or the new one, never a mixture.

All engines are paused, take the whole transfer, and are let go only when they have acknowledged it. An engine that
fails on the way stays paused and is out of routing until a whole sync has reached it; the others get the transfer
again, from its beginning, over groups without the lost one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from megatron_rlvr.sync.interfaces import (
    Engine,
    EngineAddress,
    EngineError,
    EngineSilentError,
    StageGate,
    WeightSource,
    WeightTransport,
)
from megatron_rlvr.sync.parameter_sums import WeightMismatchError
from megatron_rlvr.sync.pool import EnginePool, NoEngineError
from megatron_rlvr.sync.verification import Expected, WeightVerifier

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_ATTEMPTS = 4
"""A sync that fails so often, with servers left that answer, has a cause that trying again does not take away."""
SETTLE_TIMEOUT_S = 15.0
"""For an engine to answer after a transfer that failed: it has little to do, or is stuck in what was cut off."""


class OnMain(Protocol):
    """Runs a call on rank 0: what it returns, on every rank; a failure there ends every rank."""

    def __call__(self, call: Callable[[], T], /) -> T: ...


@dataclass(kw_only=True, slots=True)
class SyncReport:
    """What one sync came to; the same on every rank but for the bytes."""

    version: int
    serving: list[EngineAddress]
    """Servers that hold this version and may serve, in a fixed order."""
    failures: dict[str, str] = field(default_factory=dict)
    """By URL, why a registered server may not."""
    num_attempts: int = 1
    num_bytes: int = 0
    """What this rank sent in the attempt that went through."""
    num_verified: int = 0
    """Parameters whose checksums every serving server was asked for and agreed on; 0 without verification."""
    logprob_diff: float | None = None
    """Nats, the largest difference on the probe prompt; None where none was asked."""


@dataclass(kw_only=True, slots=True)
class _Outcome:
    """Of one attempt to move the weights."""

    failure: str | None = None
    blamed: set[str] = field(default_factory=set)
    """URLs of the servers that said so themselves, or that a rank could not reach."""
    num_bytes: int = 0


class WeightSync:
    """Brings all engines to the trainer's weights; every trainer rank takes part.

    Args:
        gate: collective agreement of all trainer ranks.
        on_main: runs a call on the rank that controls the servers (global rank 0).
        pool: the servers, on that rank; None elsewhere.
        connect: the engine at an address, for the other ranks.
        transport: this rank's end of the way to the engines; None where weights go through the disk.
        pause_mode: finish, in_place, retract or abort.
        verifier: compares what engines hold with what was exported, before they serve it; None trusts the transfer.

    Example:
        >>> report = sync.run(policy.weights, version=3)
        >>> route_to(report.serving)
    """

    def __init__(
        self,
        *,
        gate: StageGate,
        on_main: OnMain,
        pool: EnginePool | None,
        connect: Callable[[EngineAddress], Engine],
        transport: WeightTransport | None,
        pause_mode: str,
        verifier: WeightVerifier | None = None,
    ) -> None:
        self.gate = gate
        self.on_main = on_main
        self.pool = pool
        self.connect = connect
        self.transport = transport
        self.pause_mode = pause_mode
        self.verifier = verifier
        self._engines: dict[EngineAddress, Engine] = {}
        self._grouped: list[EngineAddress] | None = None
        """Addresses that the transport's groups are made of."""
        self._prepared = False
        """Whether the transport has begun a transfer."""

    def run(self, source: WeightSource, *, version: int) -> SyncReport:
        """Sends the weights and gives them `version` at every engine that acknowledges them.

        Raises:
            NoEngineError: no server is left that could serve.
            EngineError: the transfer failed again and again with servers that answer.
        """
        assert self.transport is not None, "run_from_disk needs no transport, run does"
        return self._transact(source, version, lambda addresses: self._transfer(source, addresses))

    def run_from_disk(self, path: str, source: WeightSource, *, version: int) -> SyncReport:
        """Lets every engine load a Hugging Face folder that all of them can read; raises as `run`.

        Args:
            source: the weights that the folder was written from.
        """
        return self._transact(source, version, lambda addresses: self._load(path, version))

    def _transact(
        self, source: WeightSource, version: int, move: Callable[[list[EngineAddress]], _Outcome]
    ) -> SyncReport:
        suspects: set[str] = set()
        outcome = _Outcome()
        if self.pool is not None:
            self.pool.begin()
        if self.transport is not None and self._grouped is not None:
            # While engines still generate; in vain only where servers have come or gone.
            self.transport.prepare(source)
            self._prepared = True
        for attempt in range(1, MAX_ATTEMPTS + 1):
            addresses = self.on_main(self._open)
            outcome = move(addresses)
            if outcome.failure is not None:
                if self.pool is not None:
                    logger.warning("weight sync of version %d, attempt %d: %s", version, attempt, outcome.failure)
                self._leave_groups()
                blamed = outcome.blamed & suspects
                self.on_main(lambda blamed=blamed: self._settle(blamed))  # type: ignore[misc]
                suspects = outcome.blamed
                continue
            report = self._conclude(source, version, addresses)
            if report.serving:
                return replace(report, num_attempts=attempt, num_bytes=outcome.num_bytes)
            outcome.failure = f"no server acknowledged it: {report.failures}"
        raise EngineError(
            f"the weight sync of version {version} failed {MAX_ATTEMPTS} times; the last time: {outcome.failure}"
        )

    def _transfer(self, source: WeightSource, addresses: list[EngineAddress]) -> _Outcome:
        """One whole transfer; collective, and ends at the first turn that fails on any rank."""
        transport = self.transport
        assert transport is not None
        if addresses != self._grouped:
            transport.use_engines(self._engines_at(addresses))
            self._grouped, self._prepared = addresses, False
        if not self._prepared:
            transport.prepare(source)
        self._prepared = False
        outcome = _Outcome()
        for turn in range(transport.num_turns):
            failure: EngineError | None = None
            try:
                outcome.num_bytes += transport.send(turn).num_bytes
            except EngineError as error:
                failure = error
            told = self.gate.gather_objects(None if failure is None else (str(failure), failure.url))
            if failures := [each for each in told if each is not None]:
                outcome.failure = "; ".join(dict.fromkeys(text for text, _ in failures))
                outcome.blamed = {url for _, url in failures if url is not None}
                break
        return outcome

    def _load(self, path: str, version: int) -> _Outcome:
        """As `_transfer`, where every engine reads by itself: one that cannot is out, the others go on."""
        self.on_main(lambda: self._on_opened(lambda engine: engine.update_from_disk(path, weight_version=version)))
        return _Outcome()

    def release_memory(self) -> None:
        """Lets the servers give their memory back until the next sync; collective."""

        def release() -> None:
            assert self.pool is not None
            self.pool.release_memory()

        self.on_main(release)

    def _conclude(self, source: WeightSource, version: int, addresses: list[EngineAddress]) -> SyncReport:
        """Lets the engines finish and tell what they hold while this side sums what they must hold; then commits."""
        if self.verifier is None:
            return self.on_main(lambda: self._commit(version, self._acknowledge(None), None))
        unchecked = self.verifier.choose([address.num_ranks for address in addresses])
        with ThreadPoolExecutor(1, thread_name_prefix="acknowledge") as thread:
            held = thread.submit(self._acknowledge, unchecked) if self.pool is not None else None
            expected = self.verifier.expect(source)
        return self.on_main(lambda: self._commit(version, held.result() if held is not None else {}, expected))

    def _engines_at(self, addresses: list[EngineAddress]) -> list[Engine]:
        """The engines of a list that rank 0 made, as this rank reaches them; one object a process."""
        known = self._engines
        self._engines = {address: known.get(address) or self.connect(address) for address in addresses}
        return list(self._engines.values())

    def _leave_groups(self) -> None:
        """Closes this side's connections, so that no engine waits for what will not come; collective."""
        if self.transport is not None:
            self.transport.use_engines([])
            self._grouped = None

    def close(self) -> None:
        """Leaves all groups; servers stay as they are."""
        if self.transport is not None:
            self.transport.close()

    # on the rank that controls the servers

    def _open(self) -> list[EngineAddress]:
        """Pauses every server that answers and opens the update there."""
        assert self.pool is not None

        pool = self.pool

        def open_update(engine: Engine) -> None:
            pool.resume_weights(engine)
            engine.pause(self.pause_mode)
            if self.transport is not None:
                engine.begin_update()

        for _ in range(MAX_ATTEMPTS):
            self.pool.opened = self.pool.candidates()
            self._on_opened(open_update)
            if self.pool.opened:
                return [self.pool.address_of(engine) for engine in self.pool.opened]
        raise NoEngineError(f"no server could be paused for a weight sync: {self.pool.failures}")

    def _settle(self, blamed: set[str]) -> None:
        """After a transfer that failed: who does not answer is out, the others are ready for the next attempt.

        Args:
            blamed: URLs of servers that failed two attempts in a row by their own word; they are out, too.
        """
        assert self.pool is not None
        self._on_opened(lambda engine: engine.settle(timeout_s=SETTLE_TIMEOUT_S))
        for engine in self.pool.opened:
            if engine.url in blamed:
                self.pool.exclude(engine, "refused two transfers one after the other")

    def _acknowledge(self, unchecked: list[str] | None) -> dict[str, list[dict[str, str]]]:
        """Every server acknowledges that it has all; by URL, checksums of what it holds.

        Args:
            unchecked: parameters to leave out; None asks for no checksums.
        """

        def acknowledge(engine: Engine) -> tuple[str, list[dict[str, str]]]:
            if self.transport is not None:
                engine.end_update()
            return engine.url, engine.weights_checksums(skip=unchecked) if unchecked is not None else []

        return dict(self._on_opened(acknowledge))

    def _commit(self, version: int, held: dict[str, list[dict[str, str]]], expected: Expected | None) -> SyncReport:
        """Those that have acknowledged, and hold what they must, take up the version and serve."""
        assert self.pool is not None
        verifier = self.verifier
        if verifier is not None and expected is not None:
            self._on_opened(lambda engine: verifier.check_weights(engine, held[engine.url], expected))
        pool = self.pool

        def release(engine: Engine) -> None:
            engine.set_weight_version(version)
            pool.resume_cache(engine)
            if self.pause_mode != "in_place":
                engine.flush_cache()
            engine.resume()

        self._on_opened(release)
        logprob_diff: float | None = None
        if verifier is not None and expected is not None and expected.logprobs is not None:

            def check_logprobs(engine: Engine) -> float:
                try:
                    return verifier.check_logprobs(engine, expected)
                except WeightMismatchError:
                    engine.pause(self.pause_mode)
                    raise

            diffs = self._on_opened(check_logprobs, among=verifier.asked(self.pool.opened, version))
            logprob_diff = max(diffs, default=None)
        self.pool.commit()
        return SyncReport(
            version=version,
            serving=self.pool.serving,
            failures=self.pool.failures,
            num_verified=expected.num_checked if expected is not None else 0,
            logprob_diff=logprob_diff,
        )

    def _on_opened(self, call: Callable[[Engine], T], *, among: Sequence[Engine] | None = None) -> list[T]:
        """Calls the engines of this attempt (or some of them) at once; those that fail are out.

        Returns:
            The answers of the others.
        """
        assert self.pool is not None
        answers: list[T] = []
        for engine, answer in self.pool.on_all(self.pool.opened if among is None else among, call):
            if isinstance(answer, EngineError):
                self.pool.exclude(engine, str(answer), stuck=isinstance(answer, EngineSilentError))
            else:
                answers.append(answer)
        return answers
