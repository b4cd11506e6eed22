"""Disaggregated weight transfer: every pipeline stage broadcasts its own layers to all engine ranks, bucket by bucket.

One process group a stage: rank 0 is the stage's source (tensor-parallel rank 0 of data-parallel rank 0), the engines'
ranks follow server by server. nccl between GPUs, gloo between CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.sync.buckets import make_buckets
from megatron_rlvr.sync.interfaces import Engine, EngineError
from megatron_rlvr.sync.process_group import free_port, join_group


@dataclass(kw_only=True, slots=True)
class TransferStats:
    """What one stage sent."""

    num_bytes: int = 0
    num_buckets: int = 0


class BroadcastTransport:
    """The source side of one pipeline stage.

    Args:
        engines: every server, in the same order on all stages.
        stage: pipeline stage of this source; names the group.
        host: address under which the engines reach this process.
        bucket_bytes: bound of one bucket.
        backend: ``nccl`` or ``gloo``.
        timeout_s: bound of the rendezvous and of every collective.
    """

    def __init__(
        self, engines: Sequence[Engine], *, stage: int, host: str, bucket_bytes: int, backend: str, timeout_s: float
    ) -> None:
        self.engines = list(engines)
        self.name = f"megatron_rlvr_stage{stage}"
        self.host = host
        self.bucket_bytes = bucket_bytes
        self.backend = backend
        self.timeout_s = timeout_s
        self.group: dist.ProcessGroup | None = None
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self.engines)), thread_name_prefix="sync")

    def connect(self) -> None:
        """Forms the group with all engine ranks.

        Raises:
            EngineError: a server refused or did not come in time.
        """
        port = free_port(self.host)
        world_size = 1 + sum(engine.num_ranks for engine in self.engines)
        calls: list[Callable[[], None]] = []
        offset = 1
        for engine in self.engines:
            calls.append(_init_call(engine, self.host, port, offset, world_size, self.name, self.backend))
            offset += engine.num_ranks
        replies = [self._pool.submit(call) for call in calls]
        try:
            self.group = join_group(
                master_address=self.host,
                master_port=port,
                rank=0,
                world_size=world_size,
                name=self.name,
                backend=self.backend,
                timeout_s=self.timeout_s,
            )
        except (dist.DistError, RuntimeError) as error:
            for reply in replies:
                if reply.done() and (reason := reply.exception()) is not None:
                    raise EngineError(f"weight-update group {self.name}: {reason}") from error
            raise EngineError(f"weight-update group {self.name}: engines did not join: {error}") from error
        for reply in replies:
            reply.result()

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> TransferStats:
        """Broadcasts all tensors; returns when every engine has loaded them.

        Raises:
            EngineError: a server failed; it then holds a mixture of old and new weights and must not serve.
        """
        if self.group is None:
            self.connect()
        stats = TransferStats()
        for bucket in make_buckets(tensors, max_bytes=self.bucket_bytes):
            replies = [
                self._pool.submit(
                    engine.update_from_distributed, bucket.metas, group_name=self.name, weight_version=None
                )
                for engine in self.engines
            ]
            self._broadcast(bucket.flat, replies)
            stats.num_bytes += bucket.flat.nbytes
            stats.num_buckets += 1
        return stats

    def _broadcast(self, flat: torch.Tensor, replies: list[Future[None]]) -> None:
        """Sends one bucket; a server's refusal ends the wait at once instead of at the collective's time-out."""
        work = dist.broadcast(flat, src=0, group=self.group, async_op=True)
        done, late = wait(replies, timeout=self.timeout_s, return_when=FIRST_EXCEPTION)
        for reply in done:
            reply.result()
        if late:
            raise EngineError(f"broadcast to {self.name}: no answer of {len(late)} server(s) in {self.timeout_s:g} s")
        work.wait()

    def close(self) -> None:
        """Leaves the group on both sides; servers that are gone are left alone."""
        if self.group is not None:
            for engine in self.engines:
                try:
                    engine.destroy_group(self.name)
                except EngineError:
                    pass  # a dead server has no group left to destroy
            dist.destroy_process_group(self.group)
            self.group = None
        self._pool.shutdown(wait=True)


def _init_call(
    engine: Engine, host: str, port: int, offset: int, world_size: int, name: str, backend: str
) -> Callable[[], None]:
    def call() -> None:
        engine.init_group(
            master_address=host,
            master_port=port,
            rank_offset=offset,
            world_size=world_size,
            group_name=name,
            backend=backend,
        )

    return call
