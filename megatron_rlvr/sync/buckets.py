"""Cuts a stream of named tensors into flat buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_rlvr.sync.interfaces import TensorMeta


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBucket:
    """Several Hugging Face tensors, end to end.

    Example:
        >>> for bucket in make_buckets(source.export(), max_bytes=256 << 20):
        ...     broadcast(bucket.flat)
    """

    metas: list[TensorMeta]
    flat: torch.Tensor
    """uint8 [sum of bytes], tensors concatenated in the order of `metas`."""


def make_buckets(tensors: Iterable[tuple[str, torch.Tensor]], *, max_bytes: int) -> Iterator[WeightBucket]:
    """Buckets of at most `max_bytes`; a larger tensor makes a bucket of its own.

    Memory held at a time: one bucket and one tensor.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            yield _flatten(held)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield _flatten(held)


def _flatten(held: list[tuple[str, torch.Tensor]]) -> WeightBucket:
    return WeightBucket(
        metas=[
            TensorMeta(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
            for name, tensor in held
        ],
        flat=torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in held]),
    )
