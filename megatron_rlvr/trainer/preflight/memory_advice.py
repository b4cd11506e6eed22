"""Rows of a preflight on memory: what fits, and which option makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rlvr.config.schema import DType, Recompute, RolloutSource, RunConfig, Transport
from megatron_rlvr.rollout.arguments import CPU_TOTAL_TOKENS
from megatron_rlvr.trainer.preflight.memory_estimate import (
    TrainerLoad,
    TrainerMemory,
    server_memory,
    terms,
    trainer_memory,
)
from megatron_rlvr.trainer.preflight.report import PreflightReport, Status, gib
from megatron_rlvr.weights.hf_config import ModelShape

CONTEXT_BYTES = 3 << 30
"""What CUDA, NCCL and the allocator's fragments take of a GPU before and beside all that is counted."""
PROCESS_BYTES = 600 << 20
"""Resident size of a trainer rank without a GPU before it has a model (torch, Megatron)."""
SERVER_PROCESS_BYTES = 1536 << 20
"""Likewise of an SGLang server."""
WORTH_SAYING = 0.03
"""Share of the memory that a change must save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Memory to fit into."""

    gpu_bytes: int | None
    """Of one GPU; None where it is not known."""
    node_bytes: int | None
    """Free main memory of a node; None where it is not known."""
    ranks_per_node: int


def add_trainer_memory(
    report: PreflightReport, config: RunConfig, shape: ModelShape, capacity: Capacity, *, world_size: int, on_gpu: bool
) -> None:
    """The fullest pipeline stage, against the memory of a GPU or a node."""
    stages = _estimate(config, shape, world_size, on_gpu=on_gpu)
    report.memory["trainer"] = [dict(terms(stage)) | {"total": stage.total} for stage in stages]
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    memory = stages[fullest]
    where = f"stage {fullest} of {len(stages)}: " if len(stages) > 1 else ""
    finding = f"{where}{gib(memory.total)} ({', '.join(f'{name} {gib(size)}' for name, size in terms(memory))})"
    limit = _limit(config, capacity, on_gpu=on_gpu)
    if limit is None:
        report.add("memory of a trainer rank", Status.skipped, f"{finding}; what there is, is not known here")
        return
    finding += f" of {gib(limit)}"
    if memory.total <= limit:
        report.add("memory of a trainer rank", Status.ok, finding)
        return
    advice = [
        f"{change}: {gib(smaller)}{'' if smaller <= limit else ' (still too much)'}"
        for change, smaller in _remedies(config, shape, world_size, on_gpu=on_gpu, now=memory.total)
    ]
    report.add("memory of a trainer rank", Status.error, finding, "; ".join(advice) or "a smaller model, or more ranks")


def _limit(config: RunConfig, capacity: Capacity, *, on_gpu: bool) -> int | None:
    if on_gpu:
        if capacity.gpu_bytes is None:
            return None
        shared = config.sync.transport is Transport.colocated and not config.sync.release_memory
        servers = config.rollout.server.mem_fraction if shared else 0.0
        return int(capacity.gpu_bytes * (1 - servers)) - CONTEXT_BYTES
    return None if capacity.node_bytes is None else capacity.node_bytes // capacity.ranks_per_node - PROCESS_BYTES


def _estimate(config: RunConfig, shape: ModelShape, world_size: int, *, on_gpu: bool) -> list[TrainerMemory]:
    parallel = config.parallel
    dp_size = world_size // (parallel.tp * parallel.pp * parallel.cp)
    tokens = config.train.max_tokens_per_microbatch
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    responses = config.rollout.prompts_per_step * config.rollout.group_size / config.train.updates_per_rollout
    load = TrainerLoad(
        tokens=tokens,
        # Prompts may be short: the logits of a micro-batch full of responses have to fit.
        response_tokens=tokens,
        num_micro_batches=max(1, int(responses * longest / tokens / dp_size)),
        dp_size=dp_size,
        reference=config.loss.kl_coef != 0.0,
    )
    return trainer_memory(shape, config.model, parallel, load, fused=on_gpu)


def _remedies(
    config: RunConfig, shape: ModelShape, world_size: int, *, on_gpu: bool, now: int
) -> Iterator[tuple[str, int]]:
    """(override, bytes of the fullest stage with it) of the options that help, those that suffice alone or not."""
    for change, changed in _changes(config):
        parallel = changed.parallel
        ranks = parallel.tp * parallel.pp * parallel.cp
        world = max(world_size, ranks)
        try:
            total = max(stage.total for stage in _estimate(changed, shape, world, on_gpu=on_gpu))
        except ValueError:
            continue  # the model does not allow it
        if world % ranks == 0 and total < (1 - WORTH_SAYING) * now:
            yield change + (f" on {world} ranks" if world > world_size else ""), total


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    model, parallel, train = config.model, config.parallel, config.train
    if model.recompute is not Recompute.full:
        yield "model.recompute=full", replace(config, model=replace(model, recompute=Recompute.full))
    if model.logits_mb is None:
        yield "model.logits_mb=1024", replace(config, model=replace(model, logits_mb=1024))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if train.max_tokens_per_microbatch > longest:
        yield (
            f"train.max_tokens_per_microbatch={longest}",
            replace(config, train=replace(train, max_tokens_per_microbatch=longest)),
        )
    if not parallel.distributed_optimizer:
        yield (
            "parallel.distributed_optimizer=true",
            replace(config, parallel=replace(parallel, distributed_optimizer=True)),
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel=true",
            replace(config, parallel=replace(parallel, sequence_parallel=True)),
        )
    more_tp = replace(parallel, tp=2 * parallel.tp, sequence_parallel=True)
    yield f"parallel.tp={more_tp.tp} with parallel.sequence_parallel=true", replace(config, parallel=more_tp)
    more_pp = replace(parallel, pp=2 * parallel.pp)
    yield f"parallel.pp={more_pp.pp}", replace(config, parallel=more_pp)


def add_server_memory(
    report: PreflightReport, config: RunConfig, shape: ModelShape, capacity: Capacity, *, on_gpu: bool
) -> None:
    """Weights and cache of a server rank: whether one sequence fits, and how many do at a time."""
    subject = "memory of a server rank"
    server = config.rollout.server
    if config.rollout.source is RolloutSource.replay:
        return
    dtype: DType = server.dtype or config.model.dtype
    memory = server_memory(shape, tp=server.tp, dtype=dtype)
    report.memory["server"] = {"weights": memory.weights, "kv_per_token": memory.kv_per_token}
    if config.rollout.urls or config.rollout.discovery:
        report.add(subject, Status.skipped, "servers are started by others")
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = server.max_total_tokens
    if on_gpu:
        if capacity.gpu_bytes is None:
            finding = f"weights {gib(memory.weights)}, cache {memory.kv_per_token} B a token"
            report.add(subject, Status.skipped, f"{finding}; the GPU's memory is not known here")
            return
        room = memory.kv_tokens(server.mem_fraction * capacity.gpu_bytes)
        tokens = room if tokens is None else tokens
        if tokens > room:
            finding = f"the cache holds {room} tokens beside {gib(memory.weights)} of weights, {tokens} are asked for"
            report.add(
                subject, Status.error, finding, "lower rollout.server.max_total_tokens or raise rollout.server.tp"
            )
            return
    tokens = CPU_TOTAL_TOKENS if tokens is None else tokens
    cache = tokens * memory.kv_per_token
    finding = (
        f"weights {gib(memory.weights)}, cache {gib(cache)} for {tokens} tokens: "
        f"{tokens // longest} sequences of {longest} at a time"
    )
    if tokens < longest:
        advice = "raise rollout.server.max_total_tokens" if not on_gpu else "raise rollout.server.tp or mem_fraction"
        report.add(subject, Status.error, f"{finding}, not even one", advice)
        return
    if not on_gpu and capacity.node_bytes is not None:
        servers = server.num_servers * server.dp * server.tp
        needed = servers * (memory.weights + cache + SERVER_PROCESS_BYTES)
        if needed > capacity.node_bytes:
            finding += f"; {servers} of them need {gib(needed)} of {gib(capacity.node_bytes)}"
            report.add(subject, Status.error, finding, "lower rollout.server.max_total_tokens or num_servers")
            return
    report.add(subject, Status.ok, finding)
