"""Shard to shard: every engine rank receives the slices that it holds, point to point, and nothing else.

Trainer and engine ranks form one process group, numbered as the plan numbers them. The engines' end runs inside
SGLang's ranks as a custom weight loader (`sync.engine_loader`); replicas forward to each other as the plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch.distributed as dist

from megatron_rlvr.sync.exchange import Counted, Exchange, Step
from megatron_rlvr.sync.interfaces import BucketCallback, Engine, EngineError, TransferStats, WeightSource
from megatron_rlvr.sync.loader_calls import Calls
from megatron_rlvr.sync.process_group import join_group, join_store, leave_group
from megatron_rlvr.sync.rank_plan import steps_by_rank, talking_pairs
from megatron_rlvr.sync.sliced import SlicedTransfer, TrainerEnd


class ShardTransport:
    """One trainer rank's part. Everything goes in one turn.

    Args:
        engines: every server, in the same order on all ranks.
        trainer: this rank.
        ep: expert-parallel size inside each server.
        bucket_bytes: bound of one bucket; every rank has two in memory.
        backend: ``nccl`` or ``gloo``.
        timeout_s: bound of the rendezvous and of every message.
    """

    num_turns = 1

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        trainer: TrainerEnd,
        ep: int,
        bucket_bytes: int,
        backend: str,
        timeout_s: float,
    ) -> None:
        self.engines = list(engines)
        self.trainer = trainer
        self.ep = ep
        self.bucket_bytes = bucket_bytes
        self.backend = backend
        self.timeout_s = timeout_s
        self._transfer: SlicedTransfer | None = None
        self._steps: list[Step] = []
        self._exchange: Exchange | None = None
        self._broken = False
        self._source: WeightSource | None = None
        self._on_bucket: BucketCallback | None = None

    def use_engines(self, engines: Sequence[Engine]) -> None:
        """Leaves the group; the next transfer goes to these servers."""
        self._leave()
        self.engines = list(engines)

    def connect(self) -> None:
        """Plans, lets the engines check the plan, and forms the group; collective, inside a weight update.

        Raises:
            EngineError: an engine refused, or did not come in time.
        """
        if self._broken:
            self._leave()
        if self._transfer is not None:
            return
        transfer = self._transfer = SlicedTransfer(
            self.trainer,
            self.engines,
            ep=self.ep,
            bucket_bytes=self.bucket_bytes,
            timeout_s=self.timeout_s,
        )
        self._broken = True
        transfer.open()
        assert self._source is not None
        steps = steps_by_rank(transfer.plan, range(transfer.plan.num_ranks))
        pairs = talking_pairs(steps)
        self._steps = steps[self.trainer.rank]
        transfer.agree(lambda: self._join(transfer, steps, pairs))
        self._broken = False

    def _join(self, transfer: SlicedTransfer, steps: dict[int, list[Step]], pairs: list[tuple[int, int]]) -> None:
        plan, address, source = transfer.plan, transfer.address, self._source
        assert address is not None
        assert source is not None
        calls: Calls = []
        if transfer.calls is not None:
            by_rank = [
                [
                    {
                        "rank": (rank := plan.engine_rank(replica, tp_rank)),
                        "steps": [asdict(step) for step in steps[rank]],
                        "pairs": [pair for pair in pairs if rank in pair],
                    }
                    for tp_rank in range(plan.engine.tp)
                ]
                for replica in range(len(self.engines))
            ]
            common = {"action": "join", "world_size": plan.num_ranks, "backend": self.backend}
            calls = transfer.calls.post(common, by_rank)
        group = join_group(
            join_store(address.host, address.port, timeout_s=self.timeout_s),
            rank=self.trainer.rank,
            world_size=plan.num_ranks,
            name=address.name,
            backend=self.backend,
            timeout_s=self.timeout_s,
        )
        self._exchange = Exchange(group, source.device)
        try:
            self._exchange.meet([pair for pair in pairs if self.trainer.rank in pair])
        except (dist.DistError, RuntimeError):
            self._leave_group()
            raise
        if transfer.calls is not None:
            transfer.calls.wait(calls)

    def prepare(self, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        """Notes what the next turn sends."""
        self._source, self._on_bucket = source, on_bucket

    def send(self, turn: int) -> TransferStats:
        """Sends this rank's slices; returns when all ranks are done and every engine rank has said what it got.

        Raises:
            EngineError: on every rank; engines may hold a mixture of old and new weights and must not serve.
        """
        self.connect()
        transfer = self._transfer
        assert transfer is not None
        self._broken = True
        stats = transfer.agree(lambda: self._send(transfer))
        self._broken = False
        return stats

    def _send(self, transfer: SlicedTransfer) -> TransferStats:
        assert self._source is not None
        assert self._exchange is not None
        calls = transfer.calls.post({"action": "receive"}) if transfer.calls is not None else []
        fill = transfer.filler(self._source, self._on_bucket)
        counted: Counted | None = None
        failure: Exception | None = None
        try:
            counted = self._exchange.run(self._steps, fill=fill, take=_takes_nothing)
        except (dist.DistError, RuntimeError) as error:
            # Whoever waits for this rank learns of it by that; else the engines would answer at their time-out.
            self._leave_group()
            failure = error
        received = None
        if transfer.calls is not None:
            # What an engine says about its failure tells more than that it went away.
            reports = transfer.calls.wait(calls)
            received = {url: [report["received_bytes"] for report in of_ranks] for url, of_ranks in reports.items()}
        if failure is not None or counted is None:
            raise EngineError(f"trainer rank {self.trainer.rank}: {failure}") from failure
        return TransferStats(num_bytes=counted.sent_bytes, num_buckets=counted.num_buckets, received_bytes=received)

    def close(self) -> None:
        """Leaves the group; the engines do so when another transfer opens."""
        self._leave()

    def _leave_group(self) -> None:
        if self._exchange is not None:
            leave_group(self._exchange.group, broken=self._broken)
            self._exchange = None

    def _leave(self) -> None:
        self._leave_group()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        self._broken = False


def _takes_nothing(step: Step, message: object) -> None:
    raise AssertionError(f"bucket {step.tag} ended at a trainer rank")
