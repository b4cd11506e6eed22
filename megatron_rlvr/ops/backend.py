"""Which implementation answers a call: the C++/CUDA extension (`native`) or plain PyTorch (`reference`).

The reference implementations register themselves on import; `megatron_rlvr.ops.native` registers the extension's
when the native backend is asked for. Both have the signatures of the faces in `megatron_rlvr.ops` and receive
arguments that the faces have already checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

BACKENDS = ("native", "reference")

NATIVE_MODULES = (
    "megatron_rlvr.ops.native",
    "megatron_rlvr.ops.native_chunked_head",
    "megatron_rlvr.ops.native_tokens",
)

F = TypeVar("F", bound=Callable[..., Any])

_implementations: dict[str, dict[str, Callable[..., Any]]] = {name: {} for name in BACKENDS}
_current = "native"


def register(op: str, *, backend: str) -> Callable[[F], F]:
    """Decorator that enters an implementation of ``op`` for ``backend``; a pair is taken once."""

    def enter(implementation: F) -> F:
        if op in _implementations[backend]:
            raise ValueError(f"op {op!r} is registered twice for backend {backend!r}")
        _implementations[backend][op] = implementation
        return implementation

    return enter


def set_backend(name: str) -> None:
    """Chooses the implementation of all ops for this process.

    Raises:
        ValueError: ``name`` is neither ``native`` nor ``reference``.
        RuntimeError: ``native`` was asked for and the extension is not built or does not load.
    """
    global _current
    if name not in BACKENDS:
        raise ValueError(f"ops.backend must be one of {list(BACKENDS)}, got {name!r}")
    if name == "native":
        _load_native()
    _current = name


def _load_native() -> None:
    try:
        for module in NATIVE_MODULES:
            importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"ops.backend=native needs the extension megatron_rlvr._C, which does not load ({error}); "
            "build it with `pip install -e .` or choose ops.backend=reference"
        ) from error


def get_backend() -> str:
    """The backend in use: ``native`` or ``reference``."""
    return _current


def implementation(op: str) -> Callable[..., Any]:
    """The current backend's implementation of ``op``.

    Raises:
        NotImplementedError: the backend does not have this op.
    """
    if _current == "native":
        _load_native()  # here and not on import: the extension takes torch's libraries with it
    try:
        return _implementations[_current][op]
    except KeyError:
        available = sorted(_implementations[_current])
        raise NotImplementedError(
            f"backend {_current!r} has no op {op!r} (it has {available}); choose ops.backend=reference"
        ) from None
