"""What transports of slices have in common: the plan, the loaders in the engines, and agreement on errors."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from megatron_rlvr.sync.exchange import Step
from megatron_rlvr.sync.interfaces import (
    BucketCallback,
    Engine,
    EngineError,
    StageGate,
    TensorMeta,
    WeightBucket,
    WeightSource,
)
from megatron_rlvr.sync.loader_calls import LoaderCalls, ReportAddress
from megatron_rlvr.sync.plan import ReshardPlan, build_plan
from megatron_rlvr.sync.rank_plan import Placement, pack_bucket, place_buckets
from megatron_rlvr.weights.engine_params import engine_places
from megatron_rlvr.weights.engine_slices import EngineLayout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.slices import box_shape


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerEnd:
    """What a transport knows of the trainer.

    Example:
        >>> TrainerEnd(mapping=mapping, dtype=torch.bfloat16, dp=2, rank=0, gate=parallel, host="10.0.0.1")
    """

    mapping: Mapping
    """The model in the trainer's layout."""
    dtype: torch.dtype
    """Of the weights, and so of what is sent."""
    dp: int
    rank: int
    """Global; rank 0 controls the servers."""
    gate: StageGate
    host: str
    """Address of this machine under which the engines and the other ranks reach this process."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


class SlicedTransfer:
    """A plan from this trainer to some engines, and its placements inside them.

    Args:
        trainer: this rank.
        engines: every server, in the same order on all ranks.
        ep: expert-parallel size inside each server.
        bucket_bytes: bound of one bucket.
        timeout_s: bound of every wait.

    Raises:
        ValueError: where the layouts do not fit the model or each other.
    """

    def __init__(
        self,
        trainer: TrainerEnd,
        engines: Sequence[Engine],
        *,
        ep: int,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        self.trainer = trainer
        self.engines = list(engines)
        tp_sizes = {engine.num_ranks for engine in engines}
        if len(tp_sizes) != 1:
            raise ValueError(f"servers must all have one tensor-parallel size, got {sorted(tp_sizes)}")
        layout = EngineLayout(tp=tp_sizes.pop(), ep=ep, replicas=len(self.engines))
        self.timeout_s = timeout_s
        self.plan: ReshardPlan = build_plan(
            trainer.mapping,
            dp=trainer.dp,
            engine=layout,
            bytes_per_element=trainer.dtype.itemsize,
            bucket_bytes=bucket_bytes,
        )
        machines = trainer.gate.gather_objects(trainer.host)
        machines += [_machine(engine.url, machines[0]) for engine in self.engines for _ in range(layout.tp)]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(machines))}
        self.plan.node_of_rank = np.array([numbers[name] for name in machines], dtype=np.int64)
        self.calls: LoaderCalls | None = None
        """On the rank that leads, once opened."""
        self.address: ReportAddress | None = None

    @property
    def num_trainer_ranks(self) -> int:
        return self.plan.trainer.num_ranks

    def agree(self, part: Callable[[], Any]) -> Any:
        """Runs this rank's part; where any rank's failed, all ranks raise.

        Raises:
            EngineError: with all ranks' words.
        """
        failure: tuple[str, str | None] | None = None
        value = None
        try:
            value = part()
        except EngineError as error:
            failure = str(error), error.url
        except RuntimeError as error:
            # torch's process groups raise these when the other end is gone or late.
            failure = f"trainer rank {self.trainer.rank}: {error}", None
        failures = [each for each in self.trainer.gate.gather_objects(failure) if each is not None]
        if failures:
            blamed = next((url for _, url in failures if url is not None), None)
            raise EngineError("; ".join(text for text, _ in failures), url=blamed)
        return value

    def open(self) -> None:
        """Gives every engine rank its placement, which it checks against its model; collective.

        Raises:
            EngineError: an engine holds other parameters than the plan fills, or did not answer.
        """

        def give() -> ReportAddress | None:
            if not self.trainer.leads:
                return None
            self.calls = LoaderCalls(self.engines, host=self.trainer.host, timeout_s=self.timeout_s)
            placements = [{"placement": self.placement(rank).to_json()} for rank in range(self.plan.engine.tp)]
            self.calls.wait(self.calls.post({"action": "open"}, [placements] * len(self.engines)))
            return self.calls.address

        address = self.agree(give)
        self.address = self.trainer.gate.gather_objects(address)[0]

    def placement(self, tp_rank: int) -> Placement:
        """What each server's rank does with its buckets."""
        places = engine_places(self.trainer.mapping.shape, self.plan.engine, tp_rank)
        return place_buckets(self.plan, places, tp_rank=tp_rank, dtype=self.dtype_name)

    @property
    def dtype_name(self) -> str:
        return str(self.trainer.dtype).removeprefix("torch.")

    def filler(self, source: WeightSource, on_bucket: BucketCallback | None) -> Callable[[Step, torch.Tensor], None]:
        """Writes buckets from this rank's own shards."""

        def fill(step: Step, flat: torch.Tensor) -> None:
            bucket = self.plan.buckets[step.tag]
            pack_bucket(bucket, flat, source.rectangle, self.trainer.dtype)
            if on_bucket is not None:
                metas = [
                    TensorMeta(name=piece.hf_name, dtype=self.dtype_name, shape=box_shape(piece.box))
                    for piece in bucket.slices
                ]
                on_bucket(WeightBucket(metas=metas, flat=flat))

        return fill

    def close(self) -> None:
        """Forgets the loaders; they forget this transfer when the next one opens."""
        if self.calls is not None:
            self.calls.close()
            self.calls = None


def _machine(url: str, leader: str) -> str:
    """Address of a server's machine, as trainer ranks give theirs; servers at loopback are beside rank 0."""
    name = urlsplit(url).hostname or url
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name  # known to a proxy alone; where a slice enters a node is all that depends on it
    return leader if ip_address(address).is_loopback else address
