"""Process groups of the trainer: Megatron's parallel state, and one gloo group for control messages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rlvr.config.schema import ParallelConfig
from megatron_rlvr.policy import platform


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank talks to the outside: rollouts, logs, files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds logits."""
        return self.pp_rank == self.pp_size - 1


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun or srun set them; (0, 1) for a process started alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class ParallelContext:
    """Owns the process groups from start to end of a run.

    Example:
        >>> with ParallelContext(ParallelConfig(tp=2), seed=0, timeout_s=600) as parallel:
        ...     parallel.ranks.tp_rank
    """

    def __init__(self, config: ParallelConfig, *, seed: int, timeout_s: float = 1800.0) -> None:
        self.config = config
        platform.install()
        timeout = timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            if platform.on_gpu():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            rank, world_size = world_from_environment()
            single = "RANK" not in os.environ
            dist.init_process_group(
                platform.collective_backend(),
                store=dist.HashStore() if single else None,
                rank=rank if single else -1,
                world_size=world_size if single else -1,
                timeout=timeout,
            )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
            context_parallel_size=config.cp,
            expert_model_parallel_size=config.ep,
            # Experts are split by expert, never inside one.
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, int(timeout_s // 60)),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self.control_group = dist.new_group(backend="gloo", timeout=timeout)
        self.ranks = Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            cp_size=parallel_state.get_context_parallel_world_size(),
        )

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    def broadcast_object(self, value: Any, *, src: int = 0) -> Any:
        """`value` of global rank `src` on every rank, over the control group."""
        box = [value]
        dist.broadcast_object_list(box, src=src, group=self.control_group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank."""
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Every rank's `value` in rank order, on rank 0; None on the others."""
        values: list[Any] | None = [None] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control_group)
        return values

    def any_rank(self, condition: bool) -> bool:
        """Whether the condition holds on any rank; the same answer on every rank."""
        flag = torch.tensor(int(condition))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(flag)

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def close(self) -> None:
        """Destroys all groups; idempotent."""
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def __enter__(self) -> ParallelContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
