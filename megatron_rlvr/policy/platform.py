"""Megatron-Core without a GPU. The only place where something of Megatron's is replaced.

`install()` does nothing where CUDA is available. Everywhere else it lets the same Megatron run on the CPU and gloo:
Megatron asks for the device "cuda" by name, for CUDA streams, and for CUDA random states; each is answered by its CPU
counterpart. Call it again after an import that may have loaded further ``megatron.*`` modules (checkpointing does).
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import torch

_TENSOR_MAKERS = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint")
_LIKE_MAKERS = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")


def on_gpu() -> bool:
    """Whether this process trains on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The training device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def collective_backend() -> str:
    """The backend of `torch.distributed`: nccl on GPUs (with gloo for CPU tensors), gloo on the CPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu() else "gloo"


def install() -> None:
    """Makes Megatron run on the CPU where no GPU is present; idempotent."""
    if on_gpu():
        return
    import megatron.core  # noqa: F401 - its modules must be loaded before their names are rebound

    if not isinstance(getattr(torch.cuda, "Stream", None), type) or not issubclass(torch.cuda.Stream, _NullStream):
        _replace_cuda_runtime()
    _bind_torch_facade()
    _replace_random_states()
    _replace_moe_gaps()


class _NullStream:
    """Stands for a stream or an event; there is one order of execution on the CPU, so all waits are met."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _NullStream:
        return _NullStream()

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 0.0


def _on_cpu(maker: Any) -> Any:
    """A tensor maker that takes a request for a CUDA device as one for the CPU and ignores pinning."""

    def make(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is not None and (isinstance(wanted, int) or torch.device(wanted).type == "cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return maker(*args, **kwargs)

    return make


class _TorchFacade(types.ModuleType):
    """`torch` as Megatron's modules see it: everything forwarded, tensor makers sent to the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _TENSOR_MAKERS + _LIKE_MAKERS:
            self.__dict__[name] = _on_cpu(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_FACADE = _TorchFacade()


def _bind_torch_facade() -> None:
    """Binds the facade as the name `torch` in every loaded megatron module; nothing global is touched."""
    for name, module in list(sys.modules.items()):
        if name.split(".", 1)[0] == "megatron" and getattr(module, "torch", None) is torch:
            module.torch = _FACADE  # type: ignore[attr-defined]


def _replace_cuda_runtime() -> None:
    """Answers for the parts of `torch.cuda` that Megatron calls without asking whether there is a GPU."""
    cpu = torch.device("cpu")
    runtime = {
        "current_device": lambda: cpu,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        # Random states: Megatron keeps one per name and swaps them; on the CPU there is one generator.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        # Streams: `Stream` must stay a class, others annotate with it and subclass it.
        "Stream": _NullStream,
        "Event": _NullStream,
        "current_stream": lambda *args, **kwargs: _NullStream(),
        "default_stream": lambda *args, **kwargs: _NullStream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }
    for name, stand_in in runtime.items():
        setattr(torch.cuda, name, stand_in)
    # Data that is asked onto "the" GPU stays where it is.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    _answer_tensor_type()


def _answer_tensor_type() -> None:
    """Lets `tensor.type()` say 'torch.cuda.*' to Megatron only: its optimizers compare these strings."""
    real_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, non_blocking, **kwargs)
        name = real_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core") else name

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _replace_random_states() -> None:
    """Megatron's own accessors would queue restores in `torch.cuda._lazy_call` for ever: silently wrong."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _replace_moe_gaps() -> None:
    """Two holes of the expert code off the GPU: a name missing without TE, and numpy wanted of a CPU tensor."""
    moe_utils = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe_utils is not None and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    dispatcher = sys.modules.get("megatron.core.transformer.moe.token_dispatcher")
    if dispatcher is not None:

        def to_cpu(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
            return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

        dispatcher.maybe_move_tensor_to_cpu = to_cpu  # type: ignore[attr-defined]
