"""Disaggregated weight transfer: every pipeline stage broadcasts its own layers to all engine ranks, bucket by bucket.

While one bucket is under way the next is gathered, in two pieces of memory that take turns; all stages have their
first bucket ready before the first turn. As soon as a server has loaded a bucket it is asked for the checksums of the
parameters that are whole with it, since a stock server checks nothing by itself.

One process group a stage: rank 0 is the stage's source (tensor-parallel rank 0 of data-parallel rank 0), the engines'
ranks follow server by server. nccl between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch
import torch.distributed as dist

from megatron_rlvr.sync.bucket_check import BucketCheck
from megatron_rlvr.sync.buckets import BucketMemory, fill_bucket, plan_buckets
from megatron_rlvr.sync.interfaces import BucketCallback, Engine, EngineError, TransferStats, WeightBucket, WeightSource
from megatron_rlvr.sync.process_group import join_group, leave_group, open_store

Held = list[dict[str, str]] | None
"""What a server answers after a bucket: by rank, checksums of parameters; None where it was not asked."""


class BroadcastTransport:
    """One trainer rank's part: the source of its pipeline stage sends, the others let it gather. A turn is a stage.

    Args:
        engines: every server, in the same order on all stages.
        stage: pipeline stage of this rank; names the group.
        num_stages: pipeline stages.
        is_source: whether this rank sends for its stage.
        host: address under which the engines reach this process.
        bucket_bytes: bound of one bucket.
        num_buffers: buckets in memory; with 1 each is gathered when the one before has arrived.
        backend: ``nccl`` or ``gloo``.
        timeout_s: bound of the rendezvous and of every collective.
        check: compares what servers hold after each bucket with what was sent; None trusts the way.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        stage: int,
        num_stages: int,
        is_source: bool,
        host: str,
        bucket_bytes: int,
        backend: str,
        timeout_s: float,
        num_buffers: int = 2,
        check: BucketCheck | None = None,
    ) -> None:
        self.engines = list(engines)
        self.stage = stage
        self.num_turns = num_stages
        self.is_source = is_source
        self._source: WeightSource | None = None
        self._on_bucket: BucketCallback | None = None
        self._runs: list[range] = []
        self._first: WeightBucket | None = None
        self._fill_s = 0.0
        """Seconds spent on buckets since the transfer began."""
        self._memory: BucketMemory | None = None
        self._broken = False
        self.name = ""
        self.host = host
        self.bucket_bytes = bucket_bytes
        self.backend = backend
        self.timeout_s = timeout_s
        self.num_buffers = num_buffers
        self.check = check
        self.group: dist.ProcessGroup | None = None
        self._pool = _threads(self.engines)

    def connect(self) -> None:
        """Forms the group with all engine ranks.

        Raises:
            EngineError: a server refused or did not come in time.
        """
        if self._broken:
            self._leave()
        if not self.is_source or self.group is not None:
            return
        # A name of its own each time: an engine may still know the group of a transfer, or a trainer, that is gone.
        self.name = f"megatron_rlvr_stage{self.stage}_{uuid.uuid4().hex}"
        store = open_store(self.host, timeout_s=self.timeout_s)
        world_size = 1 + sum(engine.num_ranks for engine in self.engines)
        calls: list[Callable[[], None]] = []
        offset = 1
        for engine in self.engines:
            calls.append(_init_call(engine, self.host, store.port, offset, world_size, self.name, self.backend))
            offset += engine.num_ranks
        replies = [self._pool.submit(call) for call in calls]
        try:
            self.group = join_group(
                store, rank=0, world_size=world_size, name=self.name, backend=self.backend, timeout_s=self.timeout_s
            )
        except (dist.DistError, RuntimeError) as error:
            for reply in replies:
                if reply.done() and (reason := reply.exception()) is not None:
                    raise EngineError(f"weight-update group {self.name}: {reason}") from error
            raise EngineError(f"weight-update group {self.name}: engines did not join: {error}") from error
        for reply in replies:
            reply.result()

    def use_engines(self, engines: Sequence[Engine]) -> None:
        """Leaves the group; the next transfer goes to these servers."""
        self._leave()
        self.engines = list(engines)
        self._pool.shutdown(wait=False)
        self._pool = _threads(self.engines)

    def prepare(self, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        """Gathers the stage's first bucket."""
        self._source, self._on_bucket = source, on_bucket
        self._first, self._fill_s = None, 0.0
        self._runs = plan_buckets(source.units(), max_bytes=self.bucket_bytes)
        if self._memory is None:
            self._memory = BucketMemory(num_buckets=self.num_buffers, device=source.device)
        if source.takes_part:
            self._first = self._fill(0)

    def send(self, turn: int) -> TransferStats:
        """Broadcasts all tensors of the stage whose turn it is; returns when every engine has loaded them.

        Raises:
            WeightMismatchError: a server holds something else than was sent.
            EngineError: a server failed; it then holds a mixture of old and new weights and must not serve.
        """
        stats = TransferStats()
        if turn != self.stage or self._first is None:
            return stats
        bucket, self._first = self._first, None
        failure: EngineError | None = None
        if self.is_source and self.check is not None:
            self.check.begin(engine.num_ranks for engine in self.engines)
        for index in range(len(self._runs)):
            following = None
            replies: list[Future[Held]] = []
            work: dist.Work | None = None
            if self.is_source and failure is None:
                try:
                    self.connect()
                    posted = time.perf_counter()
                    replies, work = self._post(bucket, last=index == len(self._runs) - 1)
                except EngineError as error:
                    failure = error
            # After a failure, too: the other ranks of the stage gather all buckets, and must not be left waiting.
            if self.num_buffers > 1:
                following = self._fill(index + 1)
            if work is not None:
                try:
                    self._finish(bucket, replies, work)
                    stats.under_way_s += time.perf_counter() - posted
                    stats.num_bytes += bucket.flat.nbytes
                    stats.num_buckets += 1
                    if self._on_bucket is not None:
                        self._on_bucket(bucket)
                except EngineError as error:
                    failure = error
            if self.num_buffers == 1:
                following = self._fill(index + 1)
            if following is None:
                break
            bucket = following
        self._rest()
        stats.fill_s = self._fill_s
        if failure is not None:
            self._broken = True
            raise failure
        return stats

    def _fill(self, index: int) -> WeightBucket | None:
        """The bucket of this index, None behind the last."""
        assert self._source is not None
        assert self._memory is not None
        if index >= len(self._runs):
            return None
        started = time.perf_counter()
        bucket = fill_bucket(self._source, self._runs[index], self._memory)
        self._fill_s += time.perf_counter() - started
        return bucket

    def _post(self, bucket: WeightBucket, *, last: bool) -> tuple[list[Future[Held]], dist.Work]:
        """Announces one bucket to all servers and begins to send it."""
        skip = self.check.announce(bucket.metas, last=last) if self.check is not None else None

        def load(engine: Engine) -> Held:
            engine.update_from_distributed(bucket.metas, group_name=self.name, weight_version=None)
            return engine.weights_checksums(skip=skip) if skip is not None else None

        replies = [self._pool.submit(load, engine) for engine in self.engines]
        try:
            return replies, dist.broadcast(bucket.flat, src=0, group=self.group, async_op=True)
        except (dist.DistError, RuntimeError) as error:
            raise EngineError(f"broadcast to {self.name}: {error}") from error

    def _finish(self, bucket: WeightBucket, replies: list[Future[Held]], work: dist.Work) -> None:
        """Waits until all servers have loaded a bucket; a refusal ends the wait at once, not at the time-out."""
        if self.check is not None:
            self.check.add(bucket)
        done, late = wait(replies, timeout=self.timeout_s, return_when=FIRST_EXCEPTION)
        for reply in done:
            reply.result()
        if late:
            raise EngineError(f"broadcast to {self.name}: no answer of {len(late)} server(s) in {self.timeout_s:g} s")
        try:
            # On a GPU the current stream waits for the broadcast, so what fills this memory next comes after it.
            work.wait()
        except (dist.DistError, RuntimeError) as error:
            raise EngineError(f"broadcast to {self.name}: {error}") from error
        if self.check is not None:
            held: list[tuple[Engine, Sequence[Mapping[str, str]]]] = []
            for engine, reply in zip(self.engines, replies, strict=True):
                if (answer := reply.result()) is not None:
                    held.append((engine, answer))
            if held:
                self.check.compare(held)

    def _rest(self) -> None:
        assert self._memory is not None
        if self._memory.device.type == "cuda":
            # Weights may change, and the memory may go elsewhere, from here on.
            torch.cuda.current_stream().synchronize()
        self._memory.rest()

    def close(self) -> None:
        """Leaves the group on both sides; servers that are gone are left alone."""
        self._leave()
        self._pool.shutdown(wait=True)

    def _leave(self) -> None:
        if self.group is None:
            return
        # This side first: an engine that still waits for a bucket answers only once its connection is gone.
        leave_group(self.group, broken=self._broken)
        self.group, self._broken = None, False
        left = [self._pool.submit(engine.destroy_group, self.name) for engine in self.engines]
        for reply in left:
            try:
                reply.result()
            except EngineError:
                pass  # a dead server has no group left to destroy


def _threads(engines: Sequence[Engine]) -> ThreadPoolExecutor:
    """One thread a server: a bucket arrives only when all of them wait for it."""
    return ThreadPoolExecutor(max_workers=max(1, len(engines)), thread_name_prefix="sync")


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
