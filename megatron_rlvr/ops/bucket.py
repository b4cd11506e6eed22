"""Faces for the flat buckets that weights travel in: many tensors end to end in one buffer, and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from megatron_rlvr.ops.backend import implementation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def pack_bucket(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensors' elements end to end, cast to ``dtype``, as the bytes that a weight transfer sends.

    Args:
        tensors: at least one tensor, all on one device, any shapes and strides.
        dtype: what the elements are cast to; None keeps each tensor's own.

    Returns:
        uint8 [total bytes] on the tensors' device.

    Raises:
        ValueError: no tensor, more than one device, or a dtype that weights do not have.
    """
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    if dtype is not None:
        _check_dtype(dtype)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {sorted(devices)}")
    return implementation("pack_bucket")(tensors, dtype)


def unpack_bucket(
    flat: torch.Tensor,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """The tensors of a bucket that was packed with ``dtype``.

    Args:
        flat: uint8 [total bytes].
        shapes: of the tensors, in order.
        dtype: of the packed elements.
        out: tensors of these shapes to write into, cast to their own dtypes; None returns views of ``flat``.

    Returns:
        ``out``, or views that share ``flat``'s memory.

    Raises:
        ValueError: ``flat`` is not contiguous uint8, its size is not that of the shapes, or ``out`` does not match.
    """
    _check_dtype(dtype)
    if flat.dtype != torch.uint8 or flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"flat must be a contiguous uint8 vector, got {flat.dtype} {list(flat.shape)}")
    num_bytes = [prod(shape) * dtype.itemsize for shape in shapes]
    if flat.numel() != sum(num_bytes):
        raise ValueError(f"flat must have {sum(num_bytes)} bytes for these shapes, got {flat.numel()}")
    if out is None:
        return [
            piece.view(dtype).view(tuple(shape)) for piece, shape in zip(flat.split(num_bytes), shapes, strict=True)
        ]
    found = [tuple(tensor.shape) for tensor in out]
    if found != [tuple(shape) for shape in shapes]:
        raise ValueError(f"out must have the shapes {[tuple(shape) for shape in shapes]}, got {found}")
    implementation("unpack_bucket_into")(flat, out, dtype)
    return list(out)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
