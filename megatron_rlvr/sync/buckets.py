"""Cuts named tensors into flat buckets of bounded size, and fills them in memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_rlvr.sync.interfaces import TensorMeta, WeightBucket, WeightSource


def plan_buckets(units: Sequence[Sequence[TensorMeta]], *, max_bytes: int) -> list[range]:
    """Runs of units whose tensors make a bucket of at most `max_bytes`; a larger unit makes a bucket of its own.

    The same units give the same buckets on every rank. A tensor of another width never starts where it could not be
    viewed in its type.
    """
    runs: list[range] = []
    first, size = 0, 0
    for index, unit in enumerate(units):
        num_bytes = sum(map(meta_bytes, unit))
        if index > first and (size + num_bytes > max_bytes or size % _width(unit[0])):
            runs.append(range(first, index))
            first, size = index, 0
        size += num_bytes
    if first < len(units):
        runs.append(range(first, len(units)))
    return runs


def meta_bytes(meta: TensorMeta) -> int:
    """Bytes of one tensor."""
    return math.prod(meta.shape) * _width(meta)


def _width(meta: TensorMeta) -> int:
    return getattr(torch, meta.dtype).itemsize


class BucketMemory:
    """Memory of several buckets, taken in turn.

    Fresh memory costs more than the copy into it, so what a CPU has touched is kept; a GPU's goes back to its
    allocator between transfers, as training needs it.

    Example:
        >>> memory = BucketMemory(num_buckets=2, device=torch.device("cpu"))
        >>> flat = memory.take(1 << 20)
    """

    def __init__(self, *, num_buckets: int, device: torch.device) -> None:
        self.device = device
        self._held: list[torch.Tensor | None] = [None] * num_buckets
        self._next = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes]; overwrites what was taken `num_buckets` calls before."""
        index = self._next
        self._next = (index + 1) % len(self._held)
        held = self._held[index]
        if held is None or held.numel() < num_bytes:
            self._held[index] = None  # the old memory goes before the new comes
            held = self._held[index] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return held[:num_bytes]

    def rest(self) -> None:
        """Between transfers."""
        if self.device.type != "cpu":
            self._held = [None] * len(self._held)


def fill_bucket(source: WeightSource, units: range, memory: BucketMemory) -> WeightBucket:
    """Gathers some units end to end; collective as `WeightSource.gather`, and right where that is."""
    metas = [meta for unit in units for meta in source.units()[unit]]
    flat = memory.take(sum(map(meta_bytes, metas)))
    offset = 0

    def place(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal offset
        start, offset = offset, offset + math.prod(shape) * dtype.itemsize
        return flat[start:offset].view(dtype).view(shape)

    for unit in units:
        source.gather(unit, into=place)
    return WeightBucket(metas=metas, flat=flat)
