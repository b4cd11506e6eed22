"""Moves weights between Hugging Face folders and this rank's Megatron chunks, by the mapping of `weights/`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rlvr.policy.layers import uses_transformer_engine
from megatron_rlvr.policy.model import unwrap
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.types import TensorMeta
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Allocator, Mapping, ParamMap
from megatron_rlvr.weights.safetensors_io import CheckpointReader
from megatron_rlvr.weights.safetensors_writer import write_checkpoint
from megatron_rlvr.weights.slices import Box, SliceMap, box_index, intersect, load_shard, shift_box


class WeightBridge:
    """Loads, exports and saves; every method is collective over the trainer's ranks.

    Args:
        chunks: this rank's chunks before or after wrapping; parameters keep their identity.
    """

    def __init__(
        self, shape: ModelShape, chunks: Sequence[torch.nn.Module], parallel: ParallelContext, mapping: Mapping
    ) -> None:
        self.shape = shape
        self.parallel = parallel
        self.mapping = mapping
        self.parameters = [dict(unwrap(chunk).named_parameters()) for chunk in chunks]
        self._scratch: torch.Tensor | None = None
        """Shards of one parameter where they are gathered; fresh memory would cost more than the copy."""
        self.params = [self._params_of(index) for index in range(len(chunks))]
        for have, want in zip(self.parameters, self.params, strict=True):
            if have.keys() != {param.name for param in want}:
                odd = sorted(have.keys() ^ {param.name for param in want})
                raise RuntimeError(f"the mapping and Megatron's model disagree on {odd[:8]}")
            self._mark_shards(have, want)

    @staticmethod
    def _mark_shards(parameters: dict[str, torch.nn.Parameter], params: Sequence[ParamMap]) -> None:
        """Marks parameters that tensor parallelism cuts.

        Megatron does so only while it initialises weights, which is skipped here; without the mark the gradient norm
        takes every shard but the first for a copy.
        """
        for param in params:
            if not param.replicated:
                tensor = parameters[param.name]
                if not getattr(tensor, "tensor_model_parallel", False):
                    tensor_parallel.set_tensor_model_parallel_attributes(tensor, True, param.axis, 1)

    def _params_of(self, chunk: int, ep_rank: int | None = None) -> list[ParamMap]:
        if ep_rank is None:
            ep_rank = parallel_state.get_expert_model_parallel_rank()
        return self.mapping.params(self.parallel.ranks.pp_rank, chunk, ep_rank)

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Copies this rank's slices of a Hugging Face folder into the parameters; padding becomes zero.

        Raises:
            ValueError: missing, broken or contradicting files, naming file and tensor.
        """
        with CheckpointReader(path) as reader:
            reader.verify(self.mapping.hf_tensors(), tied=self.shape.tie_embeddings)
            for parameters, params in zip(self.parameters, self.params, strict=True):
                for param in params:
                    target = parameters[param.name]
                    spec = param.shard(0 if param.expert else self.parallel.ranks.tp_rank)
                    target.copy_(load_shard(spec, reader, dtype=target.dtype))

    @property
    def device(self) -> torch.device:
        """Where this rank's parameters are."""
        return next(iter(self.parameters[0].values())).device

    @property
    def takes_part(self) -> bool:
        """Whether the first rank of this stage gathers from this one: data-parallel rank 0, and its expert ranks."""
        return self.parallel.ranks.dp_rank == 0 or self._in_first_expert_group

    @cached_property
    def _in_first_expert_group(self) -> bool:
        """Whether this rank's expert-parallel group holds the first rank of the stage."""
        ranks = self.parallel.ranks
        members = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
        return members[0] == ranks.pp_rank * (ranks.world_size // ranks.pp_size)

    def units(self) -> list[list[TensorMeta]]:
        """What this stage exports, parameter by parameter (an expert of every expert-parallel rank together)."""
        return self._units

    @cached_property
    def _units(self) -> list[list[TensorMeta]]:
        units = []
        for chunk, index in self._exported:
            dtype = str(self.parameters[chunk][self.params[chunk][index].name].dtype).removeprefix("torch.")
            units.append(
                [
                    TensorMeta(name=name, dtype=dtype, shape=shape)
                    for param in self._parts_of(chunk, index)
                    for name, shape in param.hf
                ]
            )
        return units

    @cached_property
    def _exported(self) -> list[tuple[int, int]]:
        """Chunk and index of every parameter that is exported."""
        return [
            (chunk, index)
            for chunk, params in enumerate(self.params)
            for index, param in enumerate(params)
            if not param.duplicate
        ]

    def _parts_of(self, chunk: int, index: int) -> list[ParamMap]:
        """The parameter on every rank that holds another one under its name."""
        param = self.params[chunk][index]
        if not param.expert:
            return [param]
        size = parallel_state.get_expert_model_parallel_world_size()
        return [self._params_of(chunk, ep_rank)[index] for ep_rank in range(size)]

    @torch.no_grad()
    def gather(self, unit: int, *, into: Allocator) -> None:
        """Gathers the Hugging Face tensors of one unit onto the stage's first rank; collective over `takes_part`.

        Args:
            into: gives the memory of every tensor.
        """
        self._gather(unit, into)

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors of this stage in a fixed order, on its first rank; nothing on the others, which
        take part by iterating."""
        for unit in range(len(self._exported)):
            yield from self._gather(unit, None)

    def _gather(self, unit: int, into: Allocator | None) -> list[tuple[str, torch.Tensor]]:
        chunk, index = self._exported[unit]
        param = self.params[chunk][index]
        shard = self.parameters[chunk][param.name].data
        if not param.expert:
            if self.parallel.ranks.dp_rank:
                return []
            group = None if param.replicated else self.parallel.tp_group
            if group is None and self.parallel.ranks.tp_rank:
                return []
            shards = self._gather_shards(shard, group, reuse=into is not None)
            return param.gather(shards, into=into) if shards else []
        if not self._in_first_expert_group:
            return []
        shards = self._gather_shards(shard, parallel_state.get_expert_model_parallel_group(), reuse=into is not None)
        return [
            tensor
            for part, each in zip(self._parts_of(chunk, index), shards, strict=False)
            for tensor in part.gather([each], into=into)
        ]

    def rectangle(self, hf_name: str, box: Box) -> torch.Tensor:
        """A view of the rectangle of a Hugging Face tensor that this rank holds.

        Raises:
            KeyError: this rank holds nothing that contains it.
        """
        for chunk, param, piece in self._held.get(hf_name, ()):
            if intersect(piece.hf_box, box) == box:
                shifted = shift_box(box, piece.hf_box, piece.shard_box)
                return self.parameters[chunk][param].data[box_index(shifted)]
        raise KeyError(f"no shard of this rank contains {box} of {hf_name}")

    @cached_property
    def _held(self) -> dict[str, list[tuple[int, str, SliceMap]]]:
        """Slices in this rank's parameters by Hugging Face name: chunk, parameter, place."""
        held: dict[str, list[tuple[int, str, SliceMap]]] = defaultdict(list)
        for chunk, params in enumerate(self.params):
            for param in params:
                if not param.duplicate:
                    spec = param.shard(0 if param.expert else self.parallel.ranks.tp_rank)
                    for piece in spec.slices:
                        held[piece.hf_name].append((chunk, param.name, piece))
        return held

    def _gather_shards(
        self, shard: torch.Tensor, group: dist.ProcessGroup | None, *, reuse: bool
    ) -> list[torch.Tensor]:
        """The shards of all ranks of a group on its first rank, nothing on the others.

        Args:
            group: None where one rank has it all.
            reuse: into memory that the next call overwrites.
        """
        if group is None or group.size() == 1:
            return [shard]
        shards: list[torch.Tensor] = []
        if group.rank() == 0:
            if reuse:
                num_bytes = group.size() * shard.nbytes
                if self._scratch is None or self._scratch.numel() < num_bytes:
                    self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=shard.device)
                memory = self._scratch[:num_bytes].view(shard.dtype)
                shards = list(memory.view(group.size(), *shard.shape))
            else:
                shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.gather(shard.contiguous(), shards or None, group=group, group_dst=0)
        return shards

    def save(self, out: str | Path, *, like: str | Path) -> None:
        """Writes a Hugging Face folder from rank 0; the other stages send it their tensors one by one.

        Config, tokenizer and generation files are copied from `like`. The folder appears whole or not at all.
        """
        ranks = self.parallel.ranks
        if ranks.is_main:
            write_checkpoint(out, self._collect(), like=like, shapes=self.mapping.hf_tensors())
        elif self.takes_part:
            self._contribute()
        self.parallel.barrier()

    def _collect(self) -> Iterator[tuple[str, torch.Tensor]]:
        """On rank 0: own tensors, then those of the later stages as they send them."""
        for name, tensor in self.export():
            yield name, tensor.cpu()
        for stage in range(1, self.parallel.ranks.pp_size):
            source = parallel_state._PIPELINE_GLOBAL_RANKS[stage]
            while (box := self._receive(source)) is not None:
                yield box

    def _contribute(self) -> None:
        ranks = self.parallel.ranks
        sends = ranks.dp_rank == 0 and ranks.tp_rank == 0 and ranks.pp_rank > 0
        for name, tensor in self.export():
            if sends:
                dist.send_object_list([(name, tensor.cpu())], dst=0, group=self.parallel.control_group)
        if sends:
            dist.send_object_list([None], dst=0, group=self.parallel.control_group)

    def _receive(self, source: int) -> tuple[str, torch.Tensor] | None:
        box: list = [None]
        dist.recv_object_list(box, src=source, group=self.parallel.control_group)
        return box[0]

    def num_parameters(self) -> int:
        """Elements of the model's Hugging Face tensors."""
        return sum(torch.Size(size).numel() for size in self.mapping.hf_tensors().values())


def mapping_for(shape: ModelShape, parallel: ParallelContext) -> Mapping:
    """The mapping of a shape in this trainer's layout and layer spec."""
    config = parallel.config
    engine = uses_transformer_engine()
    return Mapping(
        shape,
        layout=Layout(tp=config.tp, pp=config.pp, vpp=config.vpp, ep=config.ep),
        naming="te" if engine else "local",
        grouped_experts=engine and shape.num_experts > 0,
    )
