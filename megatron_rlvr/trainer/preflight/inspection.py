"""Looks at a run before any node is taken: configuration, model, data, memory, machine and cluster, in seconds.

Needs neither a process group nor a GPU. `tools/preflight.py` is its command; `slurm/submit.py` asks before it submits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_rlvr.config.schema import RolloutSource, RunConfig, Transport
from megatron_rlvr.data.problems import ProblemSet, load_problems
from megatron_rlvr.data.prompts import PromptBuilder
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.rollout.api_key import use_key_file
from megatron_rlvr.rollout.engine import FIRST_VERSION, VERSION_BEFORE, probe
from megatron_rlvr.trainer.checks.configuration import PROBE_TIMEOUT_S, check_config, check_shape
from megatron_rlvr.trainer.checks.giving_way import give_way
from megatron_rlvr.trainer.preflight.machine import check_disk, check_packages, check_ports
from megatron_rlvr.trainer.preflight.memory_advice import Capacity, add_server_memory, add_trainer_memory
from megatron_rlvr.trainer.preflight.report import PreflightReport, Row, Status
from megatron_rlvr.trainer.preflight.slurm import SlurmRequest, check_slurm
from megatron_rlvr.trainer.scratch import hf_config
from megatron_rlvr.types import EngineError
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping

SAMPLED_PROMPTS = 200
WASTED_COLUMNS = 0.05
"""Share of padding in the vocabulary that is worth a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the run shall take place."""

    nodes: int = 1
    """Of the trainer."""
    ranks_per_node: int = 1
    """Trainer ranks on each of them."""
    gpus_per_node: int = 0
    """GPUs of a node, those of servers on it included; 0: no GPUs."""
    gpu_memory_gib: float | None = None
    """None: not known, or found out where this machine has a GPU."""
    slurm: SlurmRequest | None = None
    """None: the run is not for Slurm."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def preflight(
    config: RunConfig, place: Place, *, model_config: Path | None = None, overrides: Sequence[str] = ()
) -> PreflightReport:
    """Everything that can be known before a node is taken.

    Args:
        config: as composed; what gives way to `overrides` is reset in it.
        place: nodes, ranks and GPUs.
        model_config: a config.json in place of the one in `model.path`, where the weights lie elsewhere.
        overrides: what was typed for the run, which goes before its experiment (see `checks.giving_way`).

    Returns:
        Rows in the order in which a run would come across them. Nothing is raised for what is wrong with the run.
    """
    report = PreflightReport()
    notes, _ = give_way(config, overrides, list)
    try:
        use_key_file(config.rollout.api_key_file)
    except ValueError as error:
        report.add("servers", Status.error, str(error))
    shape = _model(report, config, model_config)
    if shape is not None and _layout(report, config, shape, place):
        _configuration(report, config, shape, place, overrides, notes)
    tokenizer = _tokenizer(report, config, shape, elsewhere=model_config is not None)
    _data(report, config, tokenizer)
    _servers(report, config, place)
    if shape is not None:
        _memory(report, config, shape, place)
        report.rows.append(check_disk(config, num_parameters(shape)))
    report.rows.append(check_ports(config))
    report.rows += check_packages(config)
    if place.slurm is not None:
        report.rows += check_slurm(place.slurm)
    return report


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model, as Hugging Face counts them."""
    return sum(map(math.prod, Mapping(shape, layout=Layout(), naming="local").hf_tensors().values()))


def _model(report: PreflightReport, config: RunConfig, model_config: Path | None) -> ModelShape | None:
    scratch = config.model.scratch
    if scratch is not None and model_config is None:
        shape = ModelShape.from_hf(hf_config(scratch, scratch.vocab_size))
    else:
        source = model_config or config.model.path
        if source is None:
            report.add("model", Status.error, "neither model.path nor model.scratch is given")
            return None
        try:
            shape = ModelShape.from_hf(source)
        except ValueError as error:
            report.add("model", Status.error, str(error), "give model.path, or preflight's --model-config")
            return None
    kind = f", {shape.num_experts} experts, {shape.num_experts_per_token} a token" if shape.num_experts else ""
    finding = (
        f"{shape.family}, {num_parameters(shape):,} parameters: {shape.num_layers} layers of {shape.hidden_size}, "
        f"{shape.num_heads} heads, {shape.num_kv_heads} key heads{kind}"
    )
    report.add("model", Status.ok, finding)
    return shape


def _configuration(
    report: PreflightReport,
    config: RunConfig,
    shape: ModelShape,
    place: Place,
    overrides: Sequence[str],
    notes: Sequence[str],
) -> None:
    def check() -> list[str]:
        return check_config(config, world_size=place.world_size, local_world_size=place.ranks_per_node, shape=shape)

    try:
        warnings = [*notes, *give_way(config, overrides, check)[0]]
    except ValueError as error:
        report.add("configuration", Status.error, str(error))
        return
    for warning in warnings:
        report.add("configuration", Status.warning, warning)
    if not warnings:
        report.add("configuration", Status.ok, "consistent")


def _layout(report: PreflightReport, config: RunConfig, shape: ModelShape, place: Place) -> bool:
    """Heads, key groups, layers, experts, vocabulary and sequence length against the layout; whether all fit."""
    parallel = config.parallel
    try:
        check_shape(config, shape)
    except ValueError as error:
        report.add("layout", Status.error, str(error))
        return False
    ranks = parallel.tp * parallel.pp * parallel.cp
    finding = f"TP{parallel.tp} PP{parallel.pp} DP{place.world_size / ranks:g} on {place.world_size} ranks"
    if place.world_size % ranks:
        report.add("layout", Status.error, f"{finding}: not a multiple of {ranks}", "change parallel.tp or parallel.pp")
    elif place.nodes > 1 and parallel.tp > place.ranks_per_node:
        finding += f": tensor parallelism crosses nodes of {place.ranks_per_node} ranks"
        report.add("layout", Status.warning, finding, f"parallel.tp at most {place.ranks_per_node}, more parallel.pp")
    else:
        report.add("layout", Status.ok, finding)
    mapping = Mapping(shape, layout=Layout(tp=parallel.tp), naming="local")
    padding = mapping.padded_vocab_size - shape.vocab_size
    finding = f"{shape.vocab_size} columns and {padding} of padding, {mapping.padded_vocab_size // parallel.tp} a rank"
    wasteful = padding > WASTED_COLUMNS * shape.vocab_size
    report.add("vocabulary", Status.warning if wasteful else Status.ok, finding)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    finding = f"{longest} of {shape.max_position_embeddings} positions (prompt and response)"
    report.add("sequence length", Status.ok, finding)
    return not place.world_size % ranks


def _tokenizer(
    report: PreflightReport, config: RunConfig, shape: ModelShape | None, *, elsewhere: bool
) -> Tokenizer | None:
    if config.model.scratch is not None:
        report.add("tokenizer", Status.skipped, "made in the run")
        return None
    if config.model.path is None or (elsewhere and not Path(config.model.path).is_dir()):
        report.add("tokenizer", Status.skipped, "the model's folder is not on this machine")
        return None
    try:
        tokenizer = Tokenizer.load(config.model.path)
    except ValueError as error:
        report.add("tokenizer", Status.error, str(error))
        return None
    finding = f"{tokenizer.vocab_size} tokens"
    if shape is not None and tokenizer.vocab_size > shape.vocab_size:
        report.add("tokenizer", Status.error, f"{finding}, the model has {shape.vocab_size}", "change model.path")
    elif config.data.chat_template and tokenizer.chat_template is None:
        report.add("tokenizer", Status.error, f"{finding}, without a chat template", "set data.chat_template=false")
    else:
        report.add("tokenizer", Status.ok, finding)
    return tokenizer


def _data(report: PreflightReport, config: RunConfig, tokenizer: Tokenizer | None) -> None:
    try:
        problems = load_problems(config.data, config.reward)
        dropped = _sample_prompts(problems, config, tokenizer) if tokenizer is not None else None
    except ValueError as error:
        report.add("data", Status.error, str(error))
        return
    finding = f"{len(problems.train)} training and {len(problems.val)} held-out problems"
    if dropped is None:
        report.add("data", Status.ok, finding)
        return
    long, looked_at = dropped
    finding += f"; {long} of the first {looked_at} prompts are longer than {config.data.max_prompt_tokens} tokens"
    status = Status.error if long == looked_at else Status.warning if long > 0.1 * looked_at else Status.ok
    report.add("data", status, finding, "" if status is Status.ok else "raise data.max_prompt_tokens")


def _sample_prompts(problems: ProblemSet, config: RunConfig, tokenizer: Tokenizer) -> tuple[int, int]:
    """(too long, looked at)."""
    data = config.data
    builder = PromptBuilder(
        tokenizer,
        system_prompt=data.system_prompt,
        prompt_template=data.prompt_template,
        chat_template=data.chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    looked_at = min(SAMPLED_PROMPTS, len(problems.train))
    _, dropped = builder.build_all([problems.train[i] for i in range(looked_at)])
    return dropped, looked_at


def _servers(report: PreflightReport, config: RunConfig, place: Place) -> None:
    rollout = config.rollout
    if rollout.source is RolloutSource.replay:
        report.add("servers", Status.skipped, f"rollouts are replayed from {rollout.replay_from}")
        return
    if rollout.discovery is not None:
        report.add("servers", Status.skipped, f"register in {rollout.discovery} when they run")
        return
    for url in rollout.urls:
        report.rows.append(_asked(url))
    if rollout.urls:
        return
    server = rollout.server
    engines = server.num_servers * server.dp
    finding = f"{engines} x TP{server.tp}"
    last = server.base_gpu_id + engines * server.tp
    if place.gpus_per_node and last > place.gpus_per_node:
        finding += f" from GPU {server.base_gpu_id} on need GPUs up to {last - 1} of {place.gpus_per_node} on a node"
        report.add("servers", Status.error, finding, "lower rollout.server.num_servers, tp or base_gpu_id")
    elif config.sync.transport is Transport.colocated:
        report.add("servers", Status.ok, f"{finding} on the trainer's devices")
    elif place.gpus_per_node and place.nodes == 1 and server.base_gpu_id < place.ranks_per_node:
        finding += f" begin at GPU {server.base_gpu_id}, which is one of the trainer's {place.ranks_per_node}"
        report.add("servers", Status.error, finding, f"rollout.server.base_gpu_id={place.ranks_per_node}")
    else:
        report.add("servers", Status.ok, finding)


def _asked(url: str) -> Row:
    try:
        info = probe(url, timeout_s=PROBE_TIMEOUT_S)
    except EngineError as error:
        return Row(subject="servers", status=Status.error, finding=str(error), advice="change rollout.urls")
    finding = f"{url} answers: SGLang {info.version}, TP{info.num_ranks}, {info.model_path}"
    if not info.tried:
        advice = f"start it with SGLang {FIRST_VERSION} or later, before {VERSION_BEFORE}: others were never tried"
        return Row(subject="servers", status=Status.warning, finding=finding, advice=advice)
    return Row(subject="servers", status=Status.ok, finding=finding)


def _memory(report: PreflightReport, config: RunConfig, shape: ModelShape, place: Place) -> None:
    on_gpu = place.gpus_per_node > 0
    if place.world_size % (config.parallel.tp * config.parallel.pp * config.parallel.cp):
        return  # told under layout
    capacity = Capacity(
        gpu_bytes=_gpu_bytes(place) if on_gpu else None,
        # Nodes of a cluster are not this machine.
        node_bytes=None if on_gpu or place.slurm is not None else psutil.virtual_memory().available,
        ranks_per_node=place.ranks_per_node,
    )
    estimates: list[Callable[[], None]] = [
        lambda: add_trainer_memory(report, config, shape, capacity, world_size=place.world_size, on_gpu=on_gpu),
        lambda: add_server_memory(report, config, shape, capacity, on_gpu=on_gpu),
    ]
    for estimate in estimates:
        try:
            estimate()
        except ValueError as error:
            report.add("memory", Status.error, str(error))


def _gpu_bytes(place: Place) -> int | None:
    if place.gpu_memory_gib is not None:
        return int(place.gpu_memory_gib * (1 << 30))
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
