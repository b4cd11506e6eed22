"""What weight transfer needs from the two sides, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rlvr.types import EngineAddress, EngineError, EngineSilentError, TensorMeta
from megatron_rlvr.weights.mapping import Allocator
from megatron_rlvr.weights.slices import Box

__all__ = [
    "BucketCallback",
    "Engine",
    "EngineAddress",
    "EngineError",
    "EngineSilentError",
    "StageGate",
    "TensorMeta",
    "TransferStats",
    "WeightBucket",
    "WeightSource",
    "WeightTransport",
]


class Engine(Protocol):
    """One inference server that can take new weights. All calls block and carry a deadline.

    Every call raises `EngineError` with the server's own message when it fails, `EngineSilentError` when there is no
    answer at all.
    """

    url: str
    num_ranks: int
    """Engine ranks that join a weight-update group (TP x DP of the server)."""

    def freeze_gc(self) -> None:
        """Takes what the server has built up to now out of its garbage collections; once a server."""
        ...

    def settle(self, *, timeout_s: float | None = None) -> None:
        """Ends an update that was cut off, if there is one; the engine stays paused.

        Returns once the engine itself has answered, not only its front.
        """
        ...

    def pause(self, mode: str) -> None: ...

    def resume(self) -> None: ...

    def begin_update(self) -> None:
        """Opens a weight update where the server's version wants that, else does nothing."""
        ...

    def end_update(self) -> None: ...

    def init_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...

    def destroy_group(self, group_name: str) -> None: ...

    def update_from_distributed(
        self, metas: Sequence[TensorMeta], *, group_name: str, weight_version: int | None
    ) -> None:
        """Receives one flattened bucket (uint8 concatenation in the order of ``metas``) from the group's rank 0."""
        ...

    def update_from_tensors(self, payloads: Sequence[str], *, load_format: str) -> None:
        """Hands each tensor-parallel rank its own payload, for a loader that the server was started with.

        Args:
            payloads: by rank, base64 of a pickled list of (name, tensor).
            load_format: dotted path of the loader.
        """
        ...

    def update_from_disk(self, path: str, *, weight_version: int) -> None: ...

    def set_weight_version(self, version: int) -> None: ...

    def weight_version(self) -> str: ...

    def flush_cache(self) -> None: ...

    def release_memory(self, tags: Sequence[str]) -> None:
        """Gives device memory back (``kv_cache``, ``weights``); the engine must be idle."""
        ...

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Takes it again; weights come back without content."""
        ...

    def weights_checksums(self, *, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """Checksum of every parameter on every tensor-parallel rank, by name.

        Args:
            skip: parameters to leave out, where the server can; others may come along.
        """
        ...

    def prompt_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of all tokens of a prompt but the first."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBucket:
    """Several Hugging Face tensors, or rectangles of them, end to end in memory that is used again.

    Example:
        >>> def on_bucket(bucket: WeightBucket) -> None:
        ...     checksums.append(checksum(bucket.flat))
    """

    metas: list[TensorMeta]
    flat: Tensor
    """uint8 [sum of bytes], tensors concatenated in the order of `metas`; valid until the bucket has been sent."""


BucketCallback = Callable[[WeightBucket], None]
"""Called on the sending rank with every bucket that all its receivers have taken, while its memory is still valid."""


@dataclass(kw_only=True, slots=True)
class TransferStats:
    """What one rank sent in one turn, and what its receivers counted."""

    num_bytes: int = 0
    num_buckets: int = 0
    fill_s: float = 0.0
    """Seconds that a broadcast spent gathering its buckets, the one of `prepare` among them."""
    under_way_s: float = 0.0
    """Seconds in which a bucket of a broadcast was under way, until all servers had loaded it; what was gathered
    meanwhile counts in both."""
    received_bytes: dict[str, list[int]] | None = None
    """By server address, bytes that each tensor-parallel rank took in by its own count, on the rank that controls the
    servers; None where servers do not count."""


class StageGate(Protocol):
    """Agreement between the trainer's ranks, outside of the weights' own groups."""

    def barrier(self) -> None: ...

    def gather_objects(self, value: object) -> list:
        """Every rank's value in rank order, on every rank."""
        ...

    def gather_to_main(self, value: object) -> list | None:
        """Every rank's value in rank order, on rank 0; None on the others."""
        ...


class WeightSource(Protocol):
    """One trainer rank's share of the weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def takes_part(self) -> bool:
        """Whether this rank must call `gather`, since the stage's first rank gathers from it."""
        ...

    def units(self) -> Sequence[Sequence[TensorMeta]]:
        """What this pipeline stage exports, parameter by parameter; the same list on all of its ranks, always."""
        ...

    def gather(self, unit: int, *, into: Allocator) -> None:
        """Gathers the Hugging Face tensors of one unit onto the first rank of the stage.

        Collective over the ranks of the stage that take part.

        Args:
            into: called on the first rank for every tensor, in the order of the unit.
        """
        ...

    def rectangle(self, hf_name: str, box: Box) -> Tensor:
        """A view of the rectangle of a Hugging Face tensor that this rank holds.

        Raises:
            KeyError: it holds nothing that contains it.
        """
        ...


class WeightTransport(Protocol):
    """A way from all trainer ranks to all engine ranks. Every trainer rank has one; calls are collective over them.

    An error of one rank leaves the others in step: all ranks go through all turns, and the coordinator lets them know.
    After an `EngineError` an engine may hold a mixture, and the next `send` forms new groups.

    Example:
        >>> transport.prepare(policy)
        >>> for turn in range(transport.num_turns):
        ...     stats = transport.send(turn)
    """

    engines: list[Engine]
    """Servers that take part; replaced by `use_engines`."""
    num_turns: int
    """Turns in which the weights go, one after the other."""

    def use_engines(self, engines: Sequence[Engine]) -> None:
        """From the next `prepare` on, sends to these; leaves all groups."""
        ...

    def connect(self) -> None:
        """Forms the groups; `send` does so itself where it has not been done.

        Raises:
            EngineError: a server refused or did not come in time.
        """
        ...

    def prepare(self, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        """Begins a transfer of the weights as they are now: what can be gathered before the first turn is."""
        ...

    def send(self, turn: int) -> TransferStats:
        """Sends what belongs to the turn; returns when every engine has it.

        Raises:
            EngineError: a server failed; it then holds a mixture of old and new weights and must not serve.
        """
        ...

    def close(self) -> None:
        """Leaves all groups on both sides; servers that are gone are left alone."""
        ...
