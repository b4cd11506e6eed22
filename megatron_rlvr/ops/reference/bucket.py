"""Plain PyTorch packing of weight buckets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rlvr.ops.backend import register


@register("pack_bucket", backend="reference")
def pack_bucket(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    """See `megatron_rlvr.ops.pack_bucket`."""
    return torch.cat([t.detach().to(dtype or t.dtype).contiguous().view(-1).view(torch.uint8) for t in tensors])


@register("unpack_bucket_into", backend="reference")
def unpack_bucket_into(flat: torch.Tensor, out: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """See `megatron_rlvr.ops.unpack_bucket`."""
    pieces = flat.split([tensor.numel() * dtype.itemsize for tensor in out])
    with torch.no_grad():
        for piece, tensor in zip(pieces, out, strict=True):
            tensor.copy_(piece.view(dtype).view(tensor.shape))
