"""Moves weights between Hugging Face folders and this rank's Megatron chunks, by the mapping of `weights/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rlvr.policy.layers import uses_transformer_engine
from megatron_rlvr.policy.model import unwrap
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping, ParamMap
from megatron_rlvr.weights.safetensors_io import CheckpointReader
from megatron_rlvr.weights.safetensors_writer import write_checkpoint
from megatron_rlvr.weights.slices import load_shard


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
    def takes_part(self) -> bool:
        """Whether this rank must iterate `export`: data-parallel rank 0 does, and all ranks that hold other experts."""
        return self.parallel.ranks.dp_rank == 0 or parallel_state.get_expert_model_parallel_world_size() > 1

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors of this stage in a fixed order, gathered one parameter at a time."""
        ep_size = parallel_state.get_expert_model_parallel_world_size()
        for chunk, params in enumerate(self.params):
            for index, param in enumerate(params):
                if param.duplicate:
                    continue
                shard = self.parameters[chunk][param.name].data
                if not param.expert:
                    yield from param.gather(self._gather_shards(param, shard))
                    continue
                parts = _all_gather(shard, parallel_state.get_expert_model_parallel_group()) if ep_size > 1 else [shard]
                for ep_rank, part in enumerate(parts):
                    yield from self._params_of(chunk, ep_rank)[index].gather([part])

    def _gather_shards(self, param: ParamMap, shard: torch.Tensor) -> list[torch.Tensor]:
        if param.replicated or self.parallel.ranks.tp_size == 1:
            return [shard]
        return _all_gather(shard, self.parallel.tp_group)

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


def _all_gather(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
