"""Where rank 0's rollouts come from: the rollout process and its servers, or what an earlier run has recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from megatron_rlvr.rollout.messages import Progress, ServerTrouble, TroubleKind
from megatron_rlvr.rollout.recording import ReplayService, evaluation_file, step_file, write_batch
from megatron_rlvr.rollout.server import LocalServers
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.trainer.stopping import StopSignals
from megatron_rlvr.types import EvalBatch, RolloutBatch

logger = logging.getLogger(__name__)

Phase = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]
"""Shows a progress bar: name and total to a context whose value is called with increments."""


class RolloutSupply(Protocol):
    """Batches and evaluations; requests to stop end whatever is awaited."""

    def generate(self, step: int, *, policy_version: int) -> RolloutBatch | ServerTrouble:
        """The batch of a step; or a server that wants the weights, and then, when called again, the batch."""
        ...

    def evaluate(self, policy_version: int, *, max_problems: int | None = None) -> EvalBatch | ServerTrouble:
        """Answers to the held-out problems (the first `max_problems`); or trouble, as `generate`."""
        ...

    def answer_set(self, policy_version: int, key: str) -> EvalBatch:
        """Answers to the named set of `key`."""
        ...

    def mended(self) -> None:
        """All servers have just got the weights: trouble that was told before is over."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Data order and surplus groups after the last batch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from such a state."""
        ...


class LiveRollouts:
    """Rollouts from servers.

    Args:
        servers: the run's.
        brings_weights: whether the trainer gives servers their weights.
        num_problems: of the held-out problems ("") and the named sets, by key, for progress bars.
        record_in: folder in which every batch and evaluation is kept; None keeps nothing.
    """

    def __init__(
        self,
        service: RolloutService,
        servers: LocalServers,
        *,
        brings_weights: bool,
        phase: Phase,
        stop: StopSignals,
        prompts_per_step: int,
        num_problems: dict[str, int],
        record_in: Path | None,
    ) -> None:
        self._service = service
        self._servers = servers
        self._brings_weights = brings_weights
        self._mended_at = 0.0
        self._phase = phase
        self._stop = stop
        self._prompts_per_step = prompts_per_step
        self._num_problems = num_problems
        self._record_in = record_in

    def generate(self, step: int, *, policy_version: int) -> RolloutBatch | ServerTrouble:
        if not self._service.busy:
            self._service.generate_async(step=step, policy_version=policy_version)
        with self._phase("rollout", self._prompts_per_step) as advance:
            answer = self._wait(_advance_to(advance))
        if self._record_in is not None and isinstance(answer, RolloutBatch):
            write_batch(step_file(self._record_in, step), answer)
        assert not isinstance(answer, EvalBatch), "one thing is asked for at a time"
        return answer

    def evaluate(self, policy_version: int, *, max_problems: int | None = None) -> EvalBatch | ServerTrouble:
        if not self._service.busy:
            self._service.evaluate_async(policy_version=policy_version, max_problems=max_problems)
        with self._phase("evaluation", max_problems or self._num_problems[""]) as advance:
            answer = self._wait(_advance_to(advance))
        if self._record_in is not None and max_problems is None and isinstance(answer, EvalBatch):
            write_batch(evaluation_file(self._record_in, policy_version, None), answer)
        assert not isinstance(answer, RolloutBatch), "one thing is asked for at a time"
        return answer

    def answer_set(self, policy_version: int, key: str) -> EvalBatch:
        with self._stop.interruptible(), self._phase(f"evaluation of {key}", self._num_problems[key]) as advance:
            batch = self._service.evaluate(policy_version=policy_version, key=key, on_progress=_advance_to(advance))
        if self._record_in is not None:
            write_batch(evaluation_file(self._record_in, policy_version, key), batch)
        return batch

    def _wait(self, on_progress: Callable[[Progress], None]) -> RolloutBatch | EvalBatch | ServerTrouble:
        """The answer, or a server that was started anew; one that is silent is ended, so that it is started anew."""
        with self._stop.interruptible():
            while isinstance(found := self._service.wait(on_progress, self._servers.check), ServerTrouble):
                if found.kind is TroubleKind.silent:
                    logger.warning("server %s %s", found.url, found.reason)
                    self._servers.end_at(found.url)
                elif not self._brings_weights:
                    # All that servers hold is what they were started with.
                    urls = [address.url for address in self._servers.listed()]
                    self._service.use(urls, router_url=self._servers.router_url)
                elif found.at > self._mended_at:  # not told before the last sync and read after it
                    return found
        return found

    def mended(self) -> None:
        self._mended_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return self._service.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._service.load_state_dict(state)


class ReplayedRollouts:
    """Rollouts from files."""

    def __init__(self, service: ReplayService, *, stop: StopSignals) -> None:
        self._service = service
        self._stop = stop

    def generate(self, step: int, *, policy_version: int) -> RolloutBatch:
        with self._stop.interruptible():
            return self._service.generate(step=step)

    def evaluate(self, policy_version: int, *, max_problems: int | None = None) -> EvalBatch:
        assert max_problems is None, "a part of the held-out problems is asked for in a warm start alone"
        with self._stop.interruptible():
            return self._service.evaluate(policy_version=policy_version, key=None)

    def answer_set(self, policy_version: int, key: str) -> EvalBatch:
        with self._stop.interruptible():
            return self._service.evaluate(policy_version=policy_version, key=key)

    def mended(self) -> None:
        """Files have no weights."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step's number says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _advance_to(advance: Callable[..., None]) -> Callable[[Progress], None]:
    """Turns totals into increments."""
    shown = 0

    def on_progress(progress: Progress) -> None:
        nonlocal shown
        advance(progress.accepted - shown)
        shown = progress.accepted

    return on_progress
