"""Argument checks of the faces, the same for every backend. Messages name the argument and its value."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32)


def check_tensor(tensor: object, *, name: str, dims: int, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """The argument itself if it is a tensor with ``dims`` dimensions of one of ``dtypes``.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong number of dimensions or dtype.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must have dtype {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    return tensor


def check_same_length(expected: int, **tensors: torch.Tensor) -> None:
    """Every tensor must be [expected]."""
    for name, tensor in tensors.items():
        if tensor.shape[0] != expected:
            raise ValueError(f"{name} must have {expected} entries like the first argument, got {tensor.shape[0]}")


def check_positive(value: object, *, name: str) -> float:
    """A finite number above 0."""
    number = check_number(value, name=name)
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return number


def check_not_negative(value: object, *, name: str) -> float:
    """A finite number, 0 or above."""
    number = check_number(value, name=name)
    if number < 0:
        raise ValueError(f"{name} must be 0 or above, got {value!r}")
    return number


def check_number(value: object, *, name: str) -> float:
    """A finite int or float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_choice(value: object, *, name: str, choices: tuple[str, ...]) -> str:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    return str(value)


def check_unsigned(value: object, *, name: str, bits: int = 64) -> int:
    """An integer in [0, 2**bits)."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2**{bits}), got {value!r}")
    return number


def check_options(given: dict[str, object], *, known: tuple[str, ...], owner: str) -> None:
    """Refuses options that ``owner`` does not know or would ignore.

    Raises:
        TypeError: naming the option.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}; it has {list(known) or 'none'}")
