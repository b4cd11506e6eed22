"""One weight sync from start to end: pause, transfer, version, resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from megatron_rlvr.sync.broadcast import BroadcastTransport
from megatron_rlvr.sync.interfaces import Engine, EngineError


class StageGate(Protocol):
    """Agreement between trainer ranks, given by the policy's control group."""

    def barrier(self) -> None: ...

    def gather_objects(self, value: object) -> list: ...


class WeightSync:
    """Brings all engines to the trainer's weights; every trainer rank takes part.

    Args:
        engines: every server (all ranks hold the same list).
        gate: collective agreement of all trainer ranks.
        leads: whether this rank controls the servers (global rank 0).
        stage: this rank's pipeline stage.
        num_stages: pipeline stages.
        exports: whether this rank takes part in gathering its stage's tensors.
        transport: the sender, on the source rank of each stage; None elsewhere.
        pause_mode: in_place, retract or abort.

    Example:
        >>> sync.run(policy.export, version=3)
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        gate: StageGate,
        leads: bool,
        stage: int,
        num_stages: int,
        exports: bool,
        transport: BroadcastTransport | None,
        pause_mode: str,
    ) -> None:
        self.engines = list(engines)
        self.gate = gate
        self.leads = leads
        self.stage = stage
        self.num_stages = num_stages
        self.exports = exports
        self.transport = transport
        self.pause_mode = pause_mode

    def run(self, export: Callable[[], Iterable[tuple[str, torch.Tensor]]], *, version: int) -> int:
        """Sends the weights and gives them `version` at every engine.

        Stages go one after the other: an engine's scheduler takes one bucket at a time.

        Returns:
            Bytes this rank sent.

        Raises:
            EngineError: on every rank, when any rank or server failed; engines stay paused and must not serve.
        """
        sent = 0
        self._together(self._open)
        for stage in range(self.num_stages):
            if stage == self.stage and self.exports:
                sent += self._together(lambda: self._send(export()))
            else:
                self._together(lambda: 0)
        self._together(lambda: self._commit(version))
        return sent

    def run_from_disk(self, path: str, *, version: int) -> None:
        """Lets every engine load a Hugging Face folder that all of them can read."""
        self._together(lambda: self._on_all(lambda engine: engine.update_from_disk(path, weight_version=version)))

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        if self.transport is not None:
            return self.transport.send(tensors).num_bytes
        for _ in tensors:  # takes part in the gathering of the stage's shards
            pass
        return 0

    def _open(self) -> int:
        self._on_all(lambda engine: engine.pause(self.pause_mode))
        self._on_all(lambda engine: engine.begin_update())
        return 0

    def _commit(self, version: int) -> int:
        def commit(engine: Engine) -> None:
            engine.end_update()
            engine.set_weight_version(version)
            if self.pause_mode != "in_place":
                engine.flush_cache()
            engine.resume()

        self._on_all(commit)
        return 0

    def _on_all(self, call: Callable[[Engine], None]) -> None:
        if not self.leads:
            return
        with ThreadPoolExecutor(max_workers=max(1, len(self.engines))) as pool:
            for result in [pool.submit(call, engine) for engine in self.engines]:
                result.result()

    def _together(self, part: Callable[[], int | None]) -> int:
        """Runs this rank's part, then lets all ranks know whether all parts went well."""
        failure: str | None = None
        value: int | None = 0
        try:
            value = part()
        except EngineError as error:
            failure = str(error)
        failures = [text for text in self.gate.gather_objects(failure) if text is not None]
        if failures:
            raise EngineError("weight sync failed: " + "; ".join(failures))
        return value or 0

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
