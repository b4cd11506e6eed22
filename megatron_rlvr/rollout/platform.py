"""SGLang on a machine without a GPU: the only place where something of SGLang's world is replaced.

Stock SGLang serves on a CPU once three gaps are filled that its GPU-only wheels leave, and decodes a batch in a
reasonable time once its attention takes the batch at a time. Its sampling is made to honour a request's
``sampling_seed``, which SGLang does with ``--enable-deterministic-inference`` alone, and that it refuses on a CPU.
`install` sees to all of it before ``import sglang`` and does nothing where a GPU is present. Needed flags are in
`arguments`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
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
    _batch_the_attention()
    _honour_the_seeds()
    _fork_the_children()


def declare_torchvision_ops() -> None:
    """Lets torchvision, and with it transformers' model classes, be imported beside a +cpu torch."""
    # The torchvision on PyPI is built for CUDA: without it its library does not load, and its Python part then fails
    # at import, because it registers shapes for ops that nobody has declared.
    if hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    # `_C_stable` from 0.29 on. To declare what it declares later would end the process.
    for built in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(built))
        except OSError:
            continue
        return
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
    if not _kernels_for_this_cpu():
        sys.meta_path.insert(0, _KernelFinder())


def _kernels_for_this_cpu() -> bool:
    """Whether the sgl_kernel installed here is one that somebody built for the CPU.

    A CUDA wheel, of a login node or of `make CUDA=1`, keeps its kernels in a folder of each architecture; it cannot be
    imported without the driver, and lacks what a CPU needs.
    """
    spec = importlib.util.find_spec("sgl_kernel")
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return spec is not None and not any(Path(folder, arch).is_dir() for folder in folders for arch in ("sm90", "sm100"))


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


ATTENTION_MODULE = "sglang.srt.layers.attention.torch_native_backend"
SLOTS_AT_A_TIME = 1 << 22
"""Bound of query slots x key slots, and of gathered key slots x head size, of one padded block."""


def _batch_the_attention() -> None:
    # The torch_native backend runs Python code for every request of every layer of every token: with 128 requests
    # that is nine tenths of a decoding step of a small model.
    sys.meta_path.insert(0, _AfterImport(ATTENTION_MODULE, _give_batched_methods))


SAMPLING_INFO_MODULE = "sglang.srt.sampling.sampling_batch_info"
SAMPLER_MODULE = "sglang.srt.layers.sampler"


def _honour_the_seeds() -> None:
    # Without deterministic inference (CUDA kernels) a seed is dropped before it reaches the sampler, which then draws
    # for the whole batch from one generator: what a request gets depends on who else is in the batch.
    sys.meta_path.insert(0, _AfterImport(SAMPLING_INFO_MODULE, _keep_seeds))
    sys.meta_path.insert(0, _AfterImport(SAMPLER_MODULE, _draw_by_seeds))


def _keep_seeds(module: ModuleType) -> None:
    info_class = module.SamplingBatchInfo
    build = info_class.from_schedule_batch.__func__

    def from_schedule_batch(cls: type, batch: Any, vocab_size: int) -> Any:
        info = build(cls, batch, vocab_size)
        # One draw for every request, asked for or not, so that all ranks stay at the same place of the generator.
        drawn = torch.randint(2**62, (len(batch.reqs),)).tolist()
        given = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor(
            [own if seed is None else seed for seed, own in zip(given, drawn, strict=True)]
        )
        return info

    info_class.from_schedule_batch = classmethod(from_schedule_batch)


def _draw_by_seeds(module: ModuleType) -> None:
    plain = module.sampling_from_probs_torch
    filtered = module.top_k_top_p_min_p_sampling_from_probs_torch

    def multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return seeded_choice(logprobs.exp(), seed, positions)

    def sampling_from_probs_torch(
        probs: torch.Tensor, sampling_seed: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sampling_seed is None or positions is None:
            return plain(probs, sampling_seed=sampling_seed, positions=positions)
        return seeded_choice(probs, sampling_seed, positions).view(-1).to(torch.int32)

    @functools.wraps(filtered)
    def top_k_top_p_min_p_sampling_from_probs_torch(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(filtered).bind(*args, **kwargs)
        if given.arguments["need_min_p_sampling"]:
            given.arguments["sampling_seed"] = None  # SGLang's own restriction
        return filtered(*given.args, **given.kwargs)

    for ours in (multinomial_with_seed, sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch):
        setattr(module, ours.__name__, ours)


def seeded_choice(weights_BV: torch.Tensor, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """One index of each row, drawn by its weights from a uniform number that is a function of seed and position.

    Inverse of the cumulative distribution: one pass over a row. (SGLang's way, a Gumbel number for every token of the
    vocabulary, is a Triton kernel.)

    Args:
        weights_BV: [B, V] probabilities, or weights with any positive sum.
        seeds_B: int64 [B].
        positions_B: int [B] position of the token that is drawn, in its sequence.

    Returns:
        int64 [B, 1].
    """
    cumulative_BV = weights_BV.double().cumsum(dim=1)
    uniform_B1 = _uniform(seeds_B, positions_B)[:, None]
    # The first index whose cumulative weight exceeds the number has a weight above 0.
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)


def _uniform(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """float64 [B] in [0, 1 - 2^-52]: splitmix64 (Steele, Lea, Flood 2014) of seed and position."""
    with np.errstate(over="ignore"):
        keys = _splitmix(_splitmix(seeds_B.numpy().astype(np.uint64)) ^ positions_B.numpy().astype(np.uint64))
    return torch.from_numpy((keys >> np.uint64(12)).astype(np.float64) * 2.0**-52)


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


ENGINE_MODULE = "sglang.srt.entrypoints.engine"


def _fork_the_children() -> None:
    # SGLang spawns its scheduler and detokenizer, since a context on a GPU does not survive a fork. Here each would
    # spend most of a server's start on importing once more what its parent has imported.
    sys.meta_path.insert(0, _AfterImport(ENGINE_MODULE, _give_forking_processes))


def _give_forking_processes(module: ModuleType) -> None:
    class Forking:
        """SGLang's `multiprocessing`; the method that it sets is that of everybody else's processes."""

        Process = multiprocessing.get_context("fork").Process

        def __getattr__(self, name: str) -> Any:
            return getattr(multiprocessing, name)

    module.mp = Forking()  # type: ignore[attr-defined]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function on a module once it has been imported, which may be never."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _give_batched_methods(module: ModuleType) -> None:
    backend = module.TorchNativeAttnBackend
    for name, batched in (("_run_sdpa_forward_decode", batched_decode), ("_run_sdpa_forward_extend", batched_extend)):
        if hasattr(backend, name):
            setattr(backend, name, _with_fallback(getattr(backend, name), batched))


def _with_fallback(one_by_one: Callable[..., Any], batched: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """The batched form for plain causal self-attention, SGLang's own for everything else."""
    signature = inspect.signature(one_by_one)

    @functools.wraps(one_by_one)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        window = given.get("sliding_window_size")
        plain = (
            given.get("encoder_lens") is None
            and not given.get("is_cross_attn", False)
            and (window is None or window <= -1)
            and (given.get("causal", False) or "extend_seq_lens" not in given)
            and given["query"].dtype == given["k_cache"].dtype
        )
        if not plain:
            return one_by_one(self, *args, **kwargs)
        taken = inspect.signature(batched).parameters
        return batched(**{name: value for name, value in given.items() if name in taken})

    return method


def batched_decode(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """One new token for every request, all requests of a block in one attention call.

    Args:
        query: [B, heads, head size]; output: the same shape, filled and returned.
        k_cache, v_cache: [slots, key heads, head size].
        req_to_token: [requests, context] slots of each request's tokens.
        req_pool_indices, seq_lens: int [B].
    """
    ones = torch.ones_like(seq_lens)
    return batched_extend(
        query,
        output,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        seq_lens,
        seq_lens - 1,
        ones,
        scaling,
        enable_gqa,
    )


def batched_extend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    scaling: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """New tokens behind each request's cached prefix, causally, a padded block of requests at a time.

    Args: as `batched_decode`; query and output are [sum of extend_seq_lens, heads, head size].
    """
    new, total = extend_seq_lens.tolist(), seq_lens.tolist()
    starts = list(itertools.accumulate(new, initial=0))
    first = 0
    for last in _blocks(new, total, key_size=k_cache.shape[1] * k_cache.shape[2]):
        block = slice(first, last)
        most_new, most = max(new[block]), max(total[block])
        prefix_B, new_B = extend_prefix_lens[block, None], extend_seq_lens[block, None]
        position_Q, position_K = torch.arange(most_new), torch.arange(most)
        real_BQ = position_Q < new_B
        slots_BK = req_to_token[req_pool_indices[block], :most].long()
        # Behind its end a request's own first slot stands in: masked, and certain to hold numbers.
        slots_BK = torch.where(position_K < seq_lens[block, None], slots_BK, slots_BK[:, :1])
        # Rows by `index_select`: three times as fast as by a tensor in brackets.
        keys, values = (
            cache.index_select(0, slots_BK.flatten()).view(*slots_BK.shape, *cache.shape[1:]).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        # A query sees its request's tokens up to itself; rows of padding see what the last real one sees.
        reach_BQ = prefix_B + torch.minimum(position_Q, new_B - 1)
        mask_B1QK = (position_K <= reach_BQ[..., None])[:, None]
        is_full = min(new[block]) == most_new  # as in decoding, one token for each
        taken = query[starts[first] : starts[last]]
        shape_BQ = (last - first, most_new)
        if is_full:
            padded = taken.view(*shape_BQ, *query.shape[1:])
        else:
            padded = query.new_zeros(*shape_BQ, *query.shape[1:])
            padded[real_BQ] = taken
        attended = torch.nn.functional.scaled_dot_product_attention(
            padded.transpose(1, 2), keys, values, attn_mask=mask_B1QK, scale=scaling, enable_gqa=enable_gqa
        ).transpose(1, 2)
        output[starts[first] : starts[last]] = attended.flatten(0, 1) if is_full else attended[real_BQ]
        first = last
    return output


def _blocks(new: Sequence[int], total: Sequence[int], *, key_size: int) -> Iterator[int]:
    """Ends of runs of requests whose padded block stays small."""
    first, most_new, most = 0, 0, 0
    for index in range(len(new)):
        grown_new, grown = max(most_new, new[index]), max(most, total[index])
        if index > first and (index + 1 - first) * grown * max(grown_new, key_size) > SLOTS_AT_A_TIME:
            yield index
            first, grown_new, grown = index, new[index], total[index]
        most_new, most = grown_new, grown
    if len(new):
        yield len(new)
