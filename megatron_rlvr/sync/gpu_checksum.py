"""SGLang's checksum of a tensor on a GPU, in plain PyTorch.

A 64-bit sum over tiles of 8192 32-bit words; every word is mixed with its position, so that words that swap places
show. Source: ``sglang.kernels.ops.memory.gpu_tensor_hash`` of SGLang 0.5.21 (fmix32 of MurmurHash3, splitmix64).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_SEED = 0x243F6A88
_SEED_2 = ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK
_TILE_WORDS = 8192
_TILES_AT_A_TIME = 512
"""Bounds the working memory: 4 Mi words take some 200 MB while they are mixed."""


def tile_checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor's bytes, on whichever device it is; 0 of an empty one.

    Args:
        tensor: any shape and dtype.

    Returns:
        An unsigned 64-bit number.
    """
    words = _words(tensor)
    if not words.numel():
        return 0
    num_bytes = (words.numel() * 4) & _MASK
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = _TILES_AT_A_TIME * _TILE_WORDS
    for start in range(0, words.numel(), step):
        chunk = words[start : start + step].to(torch.int64) & _MASK
        position = torch.arange(start, start + chunk.numel(), device=chunk.device) & _MASK
        high = _tile_sums(chunk, position, factor=0x27D4EB2D, seed=_SEED, turn=15)
        low = _tile_sums(chunk, position, factor=0x165667B1, seed=_SEED_2, turn=13)
        # Wraps at 64 bits, as it should.
        total += ((_fmix32(high ^ num_bytes) << 32) | _fmix32(low ^ num_bytes)).sum()
    return _splitmix64(int(total) & _MASK64)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """int32 [ceil(bytes / 4)], padded with zeros."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    return flat.view(torch.int32)


def _tile_sums(words: torch.Tensor, position: torch.Tensor, *, factor: int, seed: int, turn: int) -> torch.Tensor:
    """int64 [tiles], 32-bit sums of the mixed words."""
    rotated = ((position << turn) & _MASK) | (position >> (32 - turn))
    mixed = _fmix32(words ^ ((position * factor + seed) & _MASK) ^ rotated)
    tail = -mixed.numel() % _TILE_WORDS
    return torch.nn.functional.pad(mixed, (0, tail)).view(-1, _TILE_WORDS).sum(1) & _MASK


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finalizer; 32-bit values in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
