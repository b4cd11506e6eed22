"""Rectangles of tensors: what a shard is made of, and proofs that rectangles cover a tensor exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""A rectangle: (start, stop) along each axis, stop exclusive."""


def whole_box(shape: Sequence[int]) -> Box:
    """The rectangle that is the whole tensor."""
    return tuple((0, length) for length in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_elements(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def box_index(box: Box) -> tuple[slice, ...]:
    """The rectangle as an index of a tensor (a view, no copy)."""
    return tuple(slice(start, stop) for start, stop in box)


def axis_box(shape: Sequence[int], axis: int, start: int, length: int) -> Box:
    """A range along one axis, everything along the others."""
    return tuple((start, start + length) if i == axis else (0, size) for i, size in enumerate(shape))


def intersect(left: Box, right: Box) -> Box | None:
    """The common part of two rectangles of one tensor, None where they do not meet."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return common if all(start < stop for start, stop in common) else None


def shift_box(box: Box, origin: Box, target: Box) -> Box:
    """Moves a rectangle from the coordinates in which its frame is ``origin`` to those in which it is ``target``."""
    return tuple(
        (start - o + t, stop - o + t) for (start, stop), (o, _), (t, _) in zip(box, origin, target, strict=True)
    )


@dataclass(frozen=True, slots=True)
class SliceMap:
    """A rectangle of a Hugging Face tensor that is, unturned, a rectangle of a Megatron shard."""

    hf_name: str
    hf_box: Box
    shard_box: Box


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One rank's shard of one Megatron parameter."""

    shape: tuple[int, ...]
    slices: tuple[SliceMap, ...]
    padding: tuple[Box, ...]
    """Rectangles of the shard that belong to no Hugging Face tensor (rows after the vocabulary)."""


class SliceReader(Protocol):
    """Where Hugging Face tensors are read from."""

    def read(self, name: str, box: Box) -> Tensor:
        """The rectangle of the tensor, reading no more than that."""
        ...


def load_shard(spec: ShardSpec, reader: SliceReader, *, dtype: torch.dtype | None = None) -> Tensor:
    """Assembles a shard on the CPU from the slices that it needs; padding is zero.

    Args:
        dtype: result type; None keeps the type of the file.
    """
    if len(spec.slices) == 1 and not spec.padding:
        only = spec.slices[0]
        tensor = reader.read(only.hf_name, only.hf_box)
        return tensor if dtype is None else tensor.to(dtype)
    shard: Tensor | None = None
    for piece in spec.slices:
        part = reader.read(piece.hf_name, piece.hf_box)
        if shard is None:
            shard = torch.empty(spec.shape, dtype=part.dtype if dtype is None else dtype)
        shard[box_index(piece.shard_box)] = part
    if shard is None:
        # A rank whose rows all lie behind the vocabulary.
        return torch.zeros(spec.shape, dtype=torch.float32 if dtype is None else dtype)
    for box in spec.padding:
        shard[box_index(box)] = 0
    return shard


class CoverageError(RuntimeError):
    """Rectangles overlap, leave a gap, or name a tensor that does not exist."""


def prove_exact_cover(what: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Proves that the rectangles cover a tensor exactly once: inside it, disjoint, and of the same volume.

    Raises:
        CoverageError: naming ``what`` and the rectangles at fault.
    """
    whole = whole_box(shape)
    for box in boxes:
        if len(box) != len(whole) or intersect(box, whole) != box:
            raise CoverageError(f"{what}: {box} lies outside of shape {tuple(shape)}")
    ordered = sorted(boxes)
    open_boxes: list[Box] = []
    for box in ordered:
        # Only rectangles that still reach beyond this one's first row can meet it.
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        for other in open_boxes:
            if intersect(box, other) is not None:
                raise CoverageError(f"{what}: {box} and {other} overlap")
        open_boxes.append(box)
    covered = sum(map(box_elements, boxes))
    if covered != math.prod(shape):
        raise CoverageError(f"{what}: {covered} of {math.prod(shape)} elements are covered")
