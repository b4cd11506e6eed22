"""Which servers take part in weight syncs and may serve; kept by the trainer rank that controls them.

A server may serve (`EnginePool.serving`) once it has acknowledged a whole sync, and until it fails one, leaves or is
started anew. Whoever routes requests reads that list after every sync.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from megatron_rlvr.sync.interfaces import Engine, EngineAddress, EngineError, EngineSilentError

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROBATION_TIMEOUT_S = 5.0
"""A server that failed the last sync must answer within this before it is given to the next one, which would otherwise
wait for it as long as for the others."""
POLL_S = 0.2
ALL_MEMORY = ("kv_cache", "weights")


class NoEngineError(EngineError):
    """No server is left that could serve."""


@dataclass(kw_only=True, slots=True)
class _Member:
    address: EngineAddress
    engine: Engine
    serving: bool = False
    prepared: bool = False
    asleep: bool = False
    """Whether it has given its memory back."""
    failed_now: bool = False
    """Whether it has failed in the sync under way."""
    failure: str | None = None
    """Why it is out; None while nothing is known against it."""


class EnginePool:
    """The servers of a run.

    Args:
        listed: the servers that are registered and alive now; another `restarts` under a known id is a new process.
        connect: the engine at an address; called once for every process.
        patience_s: for how long `candidates` waits for one server to come where none is there.
        on_stuck: called for a server that is there and does not answer; may end it, so that it is started anew.

    Example:
        >>> pool = EnginePool(listed=servers.listed, connect=http_engine, patience_s=300)
        >>> for engine in pool.candidates(): ...
    """

    def __init__(
        self,
        *,
        listed: Callable[[], Sequence[EngineAddress]],
        connect: Callable[[EngineAddress], Engine],
        patience_s: float,
        on_stuck: Callable[[EngineAddress], None] = lambda address: None,
    ) -> None:
        self._listed = listed
        self._connect = connect
        self._patience_s = patience_s
        self._on_stuck = on_stuck
        self._members: dict[str, _Member] = {}
        self._departed: dict[str, str] = {}
        self.opened: list[Engine] = []
        """Engines that take part in the sync under way and have not failed it."""

    @classmethod
    def of(cls, engines: Sequence[Engine]) -> EnginePool:
        """Servers that are there and stay."""
        addresses = [EngineAddress(id=e.url, url=e.url, num_ranks=e.num_ranks, restarts=0) for e in engines]
        known = dict(zip(addresses, engines, strict=True))
        return cls(listed=lambda: addresses, connect=lambda address: known[address], patience_s=0.0)

    @property
    def serving(self) -> list[EngineAddress]:
        """Servers that hold the weights of the last sync, whole and acknowledged."""
        return [member.address for member in self._members.values() if member.serving]

    @property
    def failures(self) -> dict[str, str]:
        """By URL, why a server does not serve that is registered, or was before this sync."""
        known = {m.address.url: m.failure for m in self._members.values() if m.failure is not None}
        return self._departed | known

    def begin(self) -> None:
        """A sync begins: servers that failed the one before may try again."""
        self.opened, self._departed = [], {}
        for member in self._members.values():
            member.failed_now = False

    def candidates(self) -> list[Engine]:
        """Servers for the next attempt: those that serve, new ones, and those that failed an earlier sync and answer.

        One that has failed in this sync comes back into it only where there is no other.

        Raises:
            NoEngineError: there was none within `patience_s`; with the reasons.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            self._refresh()
            answers = self.on_all([m.engine for m in self._members.values()], self._admit)
            found = []
            for engine, answer in answers:
                if isinstance(answer, EngineError):
                    self._note(engine, answer)
                else:
                    found.append(engine)
            if found:
                return [engine for engine in found if not self._failed_now(engine)] or found
            if time.monotonic() >= deadline:
                raise NoEngineError(f"no server is left to sync with, after {self._patience_s:g} s: {self._reasons()}")
            time.sleep(POLL_S)

    def exclude(self, engine: Engine, reason: str, *, stuck: bool = False) -> None:
        """Takes a server out until a whole sync has reached it.

        Args:
            reason: for the log and `failures`.
            stuck: it did not answer at all, and may block for long.
        """
        member = self._member(engine)
        if member is None:
            return
        logger.warning("server %s is out of routing: %s", engine.url, reason)
        member.serving, member.failure, member.failed_now = False, reason, True
        self.opened = [other for other in self.opened if other is not engine]
        if stuck:
            self._on_stuck(member.address)

    def commit(self) -> None:
        """Lets the opened engines serve: they hold the new weights. All others do not."""
        for member in self._members.values():
            member.serving = any(member.engine is engine for engine in self.opened)
            if member.serving and member.failure is not None:
                logger.warning("server %s is back in routing", member.address.url)
                member.failure = None

    def release_memory(self) -> None:
        """Lets the servers that serve give their memory back until the next sync; they cannot serve meanwhile."""
        serving = [member for member in self._members.values() if member.serving]
        for engine, answer in self.on_all([m.engine for m in serving], lambda e: e.release_memory(ALL_MEMORY)):
            if isinstance(answer, EngineError):
                self.exclude(engine, str(answer), stuck=isinstance(answer, EngineSilentError))
        for member in serving:
            member.asleep = member.serving

    def resume_weights(self, engine: Engine) -> None:
        """Takes the memory of the weights again, where an engine has given it back."""
        member = self._member(engine)
        if member is not None and member.asleep:
            engine.resume_memory(["weights"])

    def resume_cache(self, engine: Engine) -> None:
        """The rest, once the weights are there."""
        member = self._member(engine)
        if member is not None and member.asleep:
            engine.resume_memory(["kv_cache"])
            member.asleep = False

    def address_of(self, engine: Engine) -> EngineAddress:
        """Where an engine of this pool is."""
        return next(m.address for m in self._members.values() if m.engine is engine)

    def on_all(self, engines: Sequence[Engine], call: Callable[[Engine], T]) -> list[tuple[Engine, T | EngineError]]:
        """Calls all engines at once; an answer or a failure of each."""

        def guarded(engine: Engine) -> T | EngineError:
            try:
                return call(engine)
            except EngineError as error:
                return error

        with ThreadPoolExecutor(max_workers=max(1, len(engines)), thread_name_prefix="engines") as threads:
            return list(zip(engines, threads.map(guarded, engines), strict=True))

    def _refresh(self) -> None:
        """Takes over what is registered now."""
        listed = {address.id: address for address in self._listed()}
        for gone in self._members.keys() - listed.keys():
            member = self._members.pop(gone)
            self._departed[member.address.url] = member.failure or "it has left"
            logger.warning("server %s has left", member.address.url)
        for address in listed.values():
            known = self._members.get(address.id)
            if known is None or known.address != address:
                self._members[address.id] = _Member(address=address, engine=self._connect(address))

    def _admit(self, engine: Engine) -> None:
        """Passes a server that does not serve yet only if it answers, and one that has failed only if at once."""
        member = self._member(engine)
        if member is None or (member.prepared and member.failure is None):
            return
        # Also a new one: a trainer that died may have left an update open there.
        engine.settle(timeout_s=PROBATION_TIMEOUT_S if member.failure is not None else None)
        if not member.prepared:
            engine.freeze_gc()
            member.prepared = True

    def _failed_now(self, engine: Engine) -> bool:
        member = self._member(engine)
        return member is not None and member.failed_now

    def _note(self, engine: Engine, error: EngineError) -> None:
        member = self._member(engine)
        if member is not None and member.failure is None:
            self.exclude(engine, str(error), stuck=isinstance(error, EngineSilentError))

    def _member(self, engine: Engine) -> _Member | None:
        return next((m for m in self._members.values() if m.engine is engine), None)

    def _reasons(self) -> str:
        reasons = [f"{url}: {reason}" for url, reason in self.failures.items()]
        return "; ".join([*([] if self._members else ["none is registered"]), *reasons])
