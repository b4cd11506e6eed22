"""SGLang on a machine without a GPU: the only place where something of SGLang's world is replaced.

Stock SGLang serves on a CPU once three gaps are filled that its GPU-only wheels leave. `install` fills them before
``import sglang`` and does nothing where a GPU is present. Needed flags are in `arguments`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch


def gpu_available() -> bool:
    """Whether SGLang can use a GPU here; asks the driver without opening a context."""
    return torch.cuda.is_available()


@functools.cache
def install() -> None:
    """Puts the stand-ins in place, once a process; a no-op where a GPU is present."""
    if gpu_available():
        return
    declare_torchvision_ops()
    _stand_in_for_cudart()
    _stand_in_for_sgl_kernel()


def declare_torchvision_ops() -> None:
    """Lets torchvision, and with it transformers' model classes, be imported beside a +cpu torch."""
    # The torchvision on PyPI is built for CUDA: without it its library does not load, and its Python part then fails
    # at import, because it registers shapes for ops that nobody has declared.
    if hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []
"""Ops vanish with the library object that declared them."""


def _stand_in_for_cudart() -> None:
    # The scheduler synchronises and pins host buffers through cudart without asking for the device; on a CPU there
    # is nothing to wait for and nothing to pin.
    cudart = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda *_: 0,
        cudaHostUnregister=lambda *_: 0,
    )
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.cudart = lambda: cudart


def _stand_in_for_sgl_kernel() -> None:
    # sglang-kernel has wheels for CUDA only, yet its names are imported at module level on every device.
    if importlib.util.find_spec("sgl_kernel") is None:
        sys.meta_path.append(_KernelFinder())


class _KernelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``sgl_kernel`` and any submodule of it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _KernelModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["assign_req_to_token_pool_cpu"] = assign_req_to_token_pool_cpu
        module.__dict__["scalar_types"] = _Names()


class _KernelModule(ModuleType):
    """A module whose unknown names are ops that say what is missing when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        qualified = f"{self.__name__}.{name}"

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"{qualified} needs a GPU build of sglang-kernel")

        return missing


class _Names:
    """Constants that are only looked up, never used, on a CPU."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Writes each request's new KV slots into its row: ``req_to_token[r, start:end] = next slots``.

    Args:
        req_pool_indices: int64 [B] row of each request.
        req_to_token: int32 [rows, pool_len], written in place.
        start, end: int64 [B] token positions, end exclusive.
        out_cache_loc: int64 [sum(end - start)] slots of all requests in order.
        pool_len: width of ``req_to_token``.
    """
    taken = 0
    for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        assert last <= pool_len, f"request ends at token {last}, its row holds {pool_len}"
        req_to_token[row, first:last] = out_cache_loc[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first
