"""Point-to-point transfer of a plan's buckets: each rank works off its own steps, in the plan's order.

A message is a bucket's bytes, zeros up to a multiple of eight, and a checksum; who forwards a bucket forwards the
checksum that the source wrote. Two pieces of memory take turns, so a rank fills, or waits for, the next bucket while
the one before is under way. The plan's order is total, so nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.sync.buckets import BucketMemory

WORD = 8
"""Bytes of the checksum, and what a bucket's length is rounded up to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one rank does with one bucket.

    Example:
        >>> Step(tag=3, sender=0, receivers=(5,), num_bytes=1 << 20, takes=True)  # receives, forwards and keeps it
    """

    tag: int
    """The bucket's place in the plan."""
    sender: int | None
    """None at the source."""
    receivers: tuple[int, ...]
    num_bytes: int
    """Of the bucket itself."""
    takes: bool
    """Whether this rank has a use for the bucket, beyond passing it on."""

    @property
    def message_bytes(self) -> int:
        """What goes over the wire."""
        return -(-self.num_bytes // WORD) * WORD + WORD


Fill = Callable[[Step, torch.Tensor], None]
"""Writes a bucket at its source: uint8 [num_bytes]."""
Take = Callable[[Step, torch.Tensor], None]
"""Reads a bucket where it is wanted: uint8 [message_bytes], the bucket first."""


def checksum(words: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the same device: the sum of a bucket's 8-byte words, modulo 2**64.

    Any change of one word changes it; that finds what memory and wires do, not what an enemy does.

    Args:
        words: int64 [N].
    """
    return words.sum()


def difference(message: torch.Tensor) -> torch.Tensor:
    """int64 scalar, zero where a message is what its source wrote.

    Args:
        message: uint8 [message_bytes].
    """
    words = message.view(torch.int64)
    return checksum(words[:-1]) - words[-1]


class ChecksumError(RuntimeError):
    """A bucket did not arrive as it was sent."""


@dataclass(kw_only=True, slots=True)
class Counted:
    """What a rank took part in."""

    sent_bytes: int = 0
    received_bytes: int = 0
    num_buckets: int = 0


@dataclass(slots=True)
class _Flight:
    """One bucket on its way through this rank."""

    step: Step
    message: torch.Tensor
    arrival: dist.Work | None
    departures: list[dist.Work]


class Exchange:
    """One rank's end of the transfer.

    Args:
        group: ranks as the steps count them.
        device: where buckets are.

    Example:
        >>> exchange = Exchange(group, torch.device("cpu"))
        >>> exchange.meet(pairs)
        >>> exchange.run(steps, fill=pack, take=unpack)
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self._memory = BucketMemory(num_buckets=2, device=device)

    def meet(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Opens the connections of all pairs that will talk, in an order in which nobody waits in a circle.

        NCCL makes a communicator a pair, and blocks until both sides have come.

        Args:
            pairs: (lower rank, higher rank) of the whole group, in rising order.
        """
        rank = self.group.rank()
        token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        for low, high in pairs:
            if rank == low:
                dist.send(token, group=self.group, group_dst=high)
            elif rank == high:
                dist.recv(token, group=self.group, group_src=low)
        self._settle()

    def run(self, steps: Sequence[Step], *, fill: Fill, take: Take) -> Counted:
        """Works off the steps; returns when all that was sent has left and all that was received was taken.

        Raises:
            ChecksumError: a bucket arrived changed; named by its place in the plan.
        """
        counted = Counted(num_buckets=len(steps))
        differences = torch.zeros(len(steps), dtype=torch.int64, device=self.device)
        flights: list[_Flight | None] = [None, None]
        upcoming = self._start(steps[0], None, fill) if steps else None
        for index, step in enumerate(steps):
            flight = upcoming
            assert flight is not None
            flights[index % 2] = flight
            if index + 1 < len(steps):
                upcoming = self._start(steps[index + 1], flights[(index + 1) % 2], fill)
            if flight.arrival is not None:
                flight.arrival.wait()
                flight.departures = self._forward(step, flight.message)
                differences[index] = difference(flight.message)
                counted.received_bytes += step.message_bytes
            if step.takes:
                take(step, flight.message)
            counted.sent_bytes += len(step.receivers) * step.message_bytes
        for last in flights:
            if last is not None:
                _wait_all(last.departures)
        self._settle()
        self._memory.rest()
        changed = [steps[index].tag for index in differences.nonzero().flatten().tolist()]
        if changed:
            raise ChecksumError(f"{len(changed)} of {len(steps)} buckets arrived changed, first bucket {changed[0]}")
        return counted

    def _start(self, step: Step, before: _Flight | None, fill: Fill) -> _Flight:
        """Begins a bucket in the memory of the last but one."""
        if before is not None:
            _wait_all(before.departures)
        message = self._memory.take(step.message_bytes)
        if step.sender is not None:
            arrival = dist.irecv(message, group=self.group, group_src=step.sender, tag=step.tag)
            return _Flight(step, message, arrival, [])
        message[-2 * WORD :] = 0
        fill(step, message[: step.num_bytes])
        words = message.view(torch.int64)
        words[-1] = checksum(words[:-1])
        return _Flight(step, message, None, self._forward(step, message))

    def _forward(self, step: Step, message: torch.Tensor) -> list[dist.Work]:
        sent = [dist.isend(message, group=self.group, group_dst=rank, tag=step.tag) for rank in step.receivers]
        return [work for work in sent if work is not None]

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _wait_all(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()
