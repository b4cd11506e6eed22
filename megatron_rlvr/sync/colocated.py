"""Trainer and engines on the same devices: every engine rank maps the memory of the trainer rank beside it.

The slices of an engine rank meet in the trainer rank on its device (between trainer ranks they go point to point, as
the plan says); what has come together is handed over as one flat tensor a round: a CUDA IPC handle on a GPU, the
bytes themselves on a CPU. Each rank of a server takes its own tensor out of one ``update_weights_from_tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlvr.sync.exchange import Exchange, Step
from megatron_rlvr.sync.interfaces import BucketCallback, Engine, EngineError, TransferStats, WeightSource
from megatron_rlvr.sync.payload import pack_payload
from megatron_rlvr.sync.rank_plan import steps_by_rank, talking_pairs
from megatron_rlvr.sync.sliced import SlicedTransfer, TrainerEnd


class ColocatedTransport:
    """One trainer rank's part. A turn is a round: at most `bucket_bytes` for every engine rank.

    Args:
        engines: every server, in the same order on all ranks, all on this machine.
        trainer: this rank.
        ep: expert-parallel size inside each server.
        first_device: the device, and so the trainer rank, of the first engine rank; the others follow one by one.
        bucket_bytes: bound of what one engine rank takes in a round.
        timeout_s: bound of every wait.

    Raises:
        ValueError: an engine rank has no trainer rank on its device.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        trainer: TrainerEnd,
        ep: int,
        first_device: int,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        self.engines = list(engines)
        self.trainer = trainer
        self.ep = ep
        self.bucket_bytes = bucket_bytes
        self.timeout_s = timeout_s
        self.num_turns = 1
        ranks = iter(range(first_device, first_device + sum(engine.num_ranks for engine in engines)))
        self._beside = {engine.url: [next(ranks) for _ in range(engine.num_ranks)] for engine in engines}
        """By server, the trainer rank on the device of each of its ranks."""
        self._transfer: SlicedTransfer | None = None
        self._rounds: list[list[Step]] = []
        self._exchange: Exchange | None = None
        self._source: WeightSource | None = None
        self._on_bucket: BucketCallback | None = None
        self._memory: torch.Tensor | None = None
        self._num_sends = 0

    def use_engines(self, engines: Sequence[Engine]) -> None:
        """From the next transfer on, sends to these, of those that were there from the start.

        Raises:
            EngineError: another server, whose device is not known.
        """
        self._leave()
        for engine in engines:
            if engine.url not in self._beside:
                raise EngineError(f"{engine.url} is not one of the servers that share this trainer's devices")
        self.engines = list(engines)

    def connect(self) -> None:
        """Plans, and lets the engines check the plan; collective, inside a weight update.

        Raises:
            EngineError: an engine refused.
        """
        transfer = self._plan() if self._transfer is None else self._transfer
        if transfer.address is None:
            transfer.open()

    def _plan(self) -> SlicedTransfer:
        transfer = SlicedTransfer(
            self.trainer,
            self.engines,
            ep=self.ep,
            # Several buckets make a round, so that rounds come out nearly full whichever way buckets go.
            bucket_bytes=max(1 << 10, self.bucket_bytes // 4),
            timeout_s=self.timeout_s,
        )
        self._transfer = transfer
        host = [*range(transfer.num_trainer_ranks), *(r for e in self.engines for r in self._beside[e.url])]
        steps = steps_by_rank(transfer.plan, host)
        ends = _rounds(steps, num_buckets=len(transfer.plan.buckets), max_bytes=self.bucket_bytes)
        self._rounds = [
            [step for step in steps[self.trainer.rank] if first <= step.tag < last]
            for first, last in zip([0, *ends], ends, strict=False)
        ]
        self.num_turns = len(ends)
        if self._exchange is None:
            assert self._source is not None
            group = dist.group.WORLD
            assert group is not None, "the trainer's ranks have a default group"
            self._exchange = Exchange(group, self._source.device)
        self._exchange.meet([pair for pair in talking_pairs(steps) if self.trainer.rank in pair])
        return transfer

    def prepare(self, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        """Plans, where that has not been done, so that the number of turns is known."""
        self._source, self._on_bucket = source, on_bucket
        if self._transfer is None:
            self._plan()

    def send(self, turn: int) -> TransferStats:
        """Hands over one round; returns when every engine rank has copied it.

        Raises:
            EngineError: on every rank; engines may hold a mixture of old and new weights and must not serve.
        """
        self.connect()
        transfer = self._transfer
        assert transfer is not None
        self._num_sends += 1
        return transfer.agree(lambda: self._send(transfer, self._rounds[turn]))

    def _send(self, transfer: SlicedTransfer, steps: list[Step]) -> TransferStats:
        assert self._source is not None
        assert self._exchange is not None
        room = sum(step.message_bytes for step in steps if step.takes)
        device = self._source.device
        if self._memory is None or self._memory.numel() < room:
            self._memory = None
            self._memory = torch.empty(room, dtype=torch.uint8, device=device)
        memory = self._memory
        buckets: list[tuple[int, int, int, int]] = []
        filled = 0

        def take(step: Step, message: torch.Tensor) -> None:
            nonlocal filled
            memory[filled : filled + step.message_bytes].copy_(message)
            buckets.append((step.tag, filled, step.num_bytes, step.message_bytes))
            filled += step.message_bytes

        fill = transfer.filler(self._source, self._on_bucket)
        counted = self._exchange.run(steps, fill=fill, take=take)
        if device.type == "cuda":
            # The engines read this memory from other processes, which know nothing of this one's streams.
            torch.cuda.current_stream(device).synchronize()
        payload = self._payload(transfer, buckets, memory[:filled])
        payloads = self.trainer.gate.gather_to_main(payload)
        received = None
        if payloads is not None:
            assert transfer.calls is not None
            own = [[payloads[rank] for rank in self._beside[engine.url]] for engine in self.engines]
            keys = [[self._key(rank) for rank in self._beside[engine.url]] for engine in self.engines]
            reports = transfer.calls.wait(transfer.calls.post_payloads(own, keys))
            received = {url: [report["received_bytes"] for report in of_ranks] for url, of_ranks in reports.items()}
        return TransferStats(num_bytes=filled, num_buckets=counted.num_buckets, received_bytes=received)

    def _payload(self, transfer: SlicedTransfer, buckets: list[tuple[int, int, int, int]], flat: torch.Tensor) -> str:
        """What the engine rank beside this one gets; nothing where there is none."""
        if all(self.trainer.rank not in self._beside[engine.url] for engine in self.engines):
            return ""
        assert transfer.address is not None
        fields = {"action": "copy", "buckets": buckets}
        return pack_payload(transfer.address.message(self._key(self.trainer.rank), fields), flat)

    def _key(self, rank: int) -> str:
        return f"copy{self._num_sends}.{rank}"

    def close(self) -> None:
        """Forgets the engines; they forget this transfer when the next one opens."""
        self._leave()

    def _leave(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        self._memory = None


def _rounds(steps: dict[int, list[Step]], *, num_buckets: int, max_bytes: int) -> list[int]:
    """Ends of runs of buckets of which no rank takes more than `max_bytes`, or one bucket; the same on every rank."""
    takers: list[list[tuple[int, int]]] = [[] for _ in range(num_buckets)]
    for rank, own in steps.items():
        for step in own:
            if step.takes:
                takers[step.tag].append((rank, step.message_bytes))
    ends: list[int] = []
    held: dict[int, int] = {}
    for tag, taken in enumerate(takers):
        if held and any(held.get(rank, 0) + size > max_bytes for rank, size in taken):
            ends.append(tag)
            held = {}
        for rank, size in taken:
            held[rank] = held.get(rank, 0) + size
    return [*ends, num_buckets]
