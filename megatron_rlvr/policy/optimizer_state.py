"""The optimizer's state in the names and shapes of the model, so that a checkpoint knows no layout.

Megatron's own optimizer checkpoints depend on the kind of optimizer, and loading a `DistributedOptimizer` fails with
torch's Adam (megatron-core 0.16.1: the state of a new optimizer is empty, ``step`` is copied as if it were a shard,
and all parameters are given one tensor of ``step``, which then counts for every one of them). Here each parameter has
a tensor of its own shape for the fp32 main weight and for both moments, under the key of its weight behind
``optimizer.state.<name>.``; any kind of optimizer reads what any other has written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"
"""The fp32 main weight, where the model's weight is not fp32 itself."""
PREFIX = "optimizer.state"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A model parameter and what the optimizer of this rank holds of it."""

    model: torch.nn.Parameter
    main: torch.Tensor
    """fp32; a flat part of the parameter, or all of it in its shape."""
    start: int
    """First element of the part in the flattened parameter."""


def places(model_state: ShardedStateDict) -> dict[int, ShardedBase]:
    """Where every parameter of a model's sharded state lies in the checkpoint, by the parameter's id()."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def initialize(optimizer: ChainedOptimizer) -> None:
    """Gives every parameter the state that its first step would make: zero moments, step 0."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups if part.optimizer is not None else []:
            for main in group["params"]:
                state = part.optimizer.state[main]
                if not state:
                    state |= {name: torch.zeros_like(main.data) for name in MOMENTS}
                    if _steps_per_parameter(part):
                        state["step"] = torch.zeros((), dtype=torch.float32)


def sharded_state(optimizer: ChainedOptimizer, where: Mapping[int, ShardedBase]) -> ShardedStateDict:
    """The state as it is saved; collective over data-parallel ranks, the first of which gets what is sharded.

    Args:
        where: see `places`.
    """
    initialize(optimizer)
    state: ShardedStateDict = {}
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        if isinstance(part, DistributedOptimizer) and part.data_parallel_group.size() > 1:
            whole = _gathered(part)
        else:
            whole = ((entry.model, _shaped(_tensors(part, entry), entry.model)) for entry in _entries(part))
        for model, tensors in whole:
            state |= _placed(len(state), where[id(model)], tensors)
    return state


def targets(optimizer: ChainedOptimizer, where: Mapping[int, ShardedBase]) -> ShardedStateDict:
    """What this rank wants to read: whole parameters, of which it keeps its part."""
    initialize(optimizer)
    state: ShardedStateDict = {}
    for number, (part, entry) in enumerate(_all_entries(optimizer)):
        names = _tensors(part, entry)
        state |= _placed(number, where[id(entry.model)], {name: torch.empty(entry.model.shape) for name in names})
    return state


@torch.no_grad()
def restore(optimizer: ChainedOptimizer, loaded: Mapping[str, torch.Tensor], *, step: int) -> None:
    """Puts what was read for `targets` in its place.

    Args:
        step: optimizer steps that the moments have seen.
    """
    for number, (part, entry) in enumerate(_all_entries(optimizer)):
        for name, tensor in _tensors(part, entry).items():
            whole = loaded[f"{number}.{name}"].reshape(-1)
            tensor.view(-1).copy_(whole[entry.start : entry.start + tensor.numel()])
        if _steps_per_parameter(part):
            # One tensor each: the optimizer counts in place.
            part.optimizer.state[entry.main]["step"] = torch.tensor(float(step))
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None and not _steps_per_parameter(part):
            for group in part.optimizer.param_groups:
                group["step"] = step


def living_storages(optimizer: ChainedOptimizer) -> set[int]:
    """Addresses of the memory that the next optimizer step writes to; what else is in `sharded_state` stays as it is.

    Those of the model's own weights among them only where the optimizer works on them directly.
    """
    initialize(optimizer)
    return {
        tensor.untyped_storage().data_ptr()
        for part, entry in _all_entries(optimizer)
        for tensor in (entry.main, entry.model, *_tensors(part, entry).values())
    }


def num_steps(optimizer: ChainedOptimizer) -> int:
    """Optimizer steps that the moments have seen (skipped updates are none)."""
    for part, entry in _all_entries(optimizer):
        if _steps_per_parameter(part):
            return int(part.optimizer.state[entry.main]["step"])
        return int(part.optimizer.param_groups[0].get("step", 0))
    return 0


def _steps_per_parameter(part: MegatronOptimizer) -> bool:
    """Whether it is torch's Adam, which counts steps in each parameter's state; fused ones count in the group."""
    return type(part.optimizer).__module__.startswith("torch.")


def _placed(number: int, where: ShardedBase, tensors: Mapping[str, torch.Tensor]) -> ShardedStateDict:
    """Tensors of one parameter where its weight lies; layers share a key, so the entries are numbered."""
    placed: ShardedStateDict = {}
    for name, tensor in tensors.items():
        extra = {} if isinstance(where, ShardedTensorFactory) else {"dtype": tensor.dtype}
        placed[f"{number}.{name}"] = replace(where, key=f"{PREFIX}.{name}.{where.key}", data=tensor, **extra)
    return placed


def _tensors(part: MegatronOptimizer, entry: _Entry) -> dict[str, torch.Tensor]:
    """This rank's main weight (where it is not the model's own) and moments."""
    state = part.optimizer.state[entry.main]
    own = {} if entry.model.dtype is torch.float32 else {MAIN: entry.main.data}
    return own | {name: state[name] for name in MOMENTS}


def _all_entries(optimizer: ChainedOptimizer) -> Iterator[tuple[MegatronOptimizer, _Entry]]:
    for part in optimizer.chained_optimizers:
        for entry in _entries(part):
            yield part, entry


def _shaped(tensors: Mapping[str, torch.Tensor], model: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Flat tensors of a whole parameter in its shape; views."""
    return {name: tensor.view(model.shape) for name, tensor in tensors.items()}


def _entries(part: MegatronOptimizer) -> Iterator[_Entry]:
    """Every parameter of which this rank's optimizer holds something."""
    if part.optimizer is None:
        return
    if isinstance(part, DistributedOptimizer):
        for buffer in part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for model, ranges in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[model]
                        main = part.optimizer.param_groups[group]["params"][order]
                        yield _Entry(model=model, main=main, start=ranges["param"].start)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            *zip(part.float16_groups, part.fp32_from_float16_groups, strict=True),
            *((group, group) for group in part.fp32_from_fp32_groups),
        ]
        for models, mains in pairs:
            for model, main in zip(models, mains, strict=True):
                yield _Entry(model=model, main=main, start=0)
    else:
        assert isinstance(part, FP32Optimizer), type(part)
        for model in part.get_parameters():
            yield _Entry(model=model, main=model, start=0)


def _gathered(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    """Whole parameters' state on the first data-parallel rank; nothing on the others."""
    world = part.get_parameter_state_dp_zero(use_gloo_comm=True, return_on_all_ranks=False)
    if world is None:
        return
    for index, buffer in enumerate(part.buffers):
        [flat] = world[index].values()
        for model, (start, stop, _) in buffer.param_index_map.items():
            names: Sequence[str] = MOMENTS if model.dtype is torch.float32 else (MAIN, *MOMENTS)
            yield model, {name: flat[name][start:stop].reshape(model.shape) for name in names}
