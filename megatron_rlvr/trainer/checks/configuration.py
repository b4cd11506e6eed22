"""Checks of a configuration against itself, the model and the world, before anything is started."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

from megatron_rlvr.advantage import ESTIMATORS, validate_advantage
from megatron_rlvr.config.no_effect import NoEffectError
from megatron_rlvr.config.schema import (
    EvalConfig,
    GroupFilter,
    RolloutConfig,
    RolloutSource,
    RunConfig,
    Schedule,
    WarmStartConfig,
)
from megatron_rlvr.data.eval_sets import check_sets
from megatron_rlvr.data.problems import load_problems
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.loss import LOSSES, validate_loss
from megatron_rlvr.loss.aggregation import AGGREGATIONS
from megatron_rlvr.ops import backend
from megatron_rlvr.rollout.api_key import check_listening, read_key
from megatron_rlvr.rollout.engine import probe
from megatron_rlvr.trainer.checks.composition import check_composition
from megatron_rlvr.trainer.checks.transport import check_transport
from megatron_rlvr.trainer.diagnostics.look import check_diagnostics
from megatron_rlvr.types import EngineError
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout

PROBE_TIMEOUT_S = 5.0


def check_config(
    config: RunConfig, *, world_size: int, local_world_size: int | None = None, shape: ModelShape | None = None
) -> list[str]:
    """Refuses what cannot work or would be ignored.

    Args:
        world_size: trainer ranks.
        local_world_size: those on this machine; None where all are.
        shape: the model's, where its folder need not be on this machine; None: read from `model.path`.

    Returns:
        Warnings worth a line at start-up.

    Raises:
        ValueError: naming the field, what it must be and what it was.
    """
    _check_model_source(config, shape)
    _check_layout(config, world_size)
    _check_numbers(config)
    _check_rollout(config.rollout)
    check_transport(config, world_size=world_size, local_world_size=local_world_size or world_size)
    _check_checkpoint(config)
    _check_source(config)
    check_diagnostics(config.diagnostics)
    _check_warm_start(config.warm_start, scratch=config.model.scratch is not None)
    ESTIMATORS.get(config.advantage.estimator)
    LOSSES.get(config.loss.name)
    if config.loss.aggregation not in AGGREGATIONS:
        raise ValueError(f"loss.aggregation must be one of {sorted(AGGREGATIONS)}, got {config.loss.aggregation!r}")
    validate_advantage(config.advantage)
    warnings = validate_loss(config.loss, config.train.updates_per_rollout)
    check_composition(config)
    try:
        backend.set_backend(config.ops.backend.value)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if config.logging.wandb_project is not None and not config.logging.wandb:
        raise NoEffectError(
            "logging.wandb_project has no effect while logging.wandb is false",
            option="logging.wandb_project",
            because=["logging.wandb"],
        )
    return list(warnings)


def check_shape(config: RunConfig, shape: ModelShape) -> None:
    """Refuses a layout that does not fit the model, and sequences longer than its positions."""
    parallel = config.parallel
    Layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep).check(shape)
    if shape.dense_layers:
        raise ValueError(
            f"model.path must have experts in every layer or in none, but layers {list(shape.dense_layers)} are dense"
        )
    if shape.num_experts and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.sequence_parallel must be true for a model with experts and parallel.tp > 1, got {parallel.tp}"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_position_embeddings:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_response_tokens must be at most the model's "
            f"{shape.max_position_embeddings} positions, got {longest}"
        )
    for spec in config.eval.sets:
        asked = spec.max_response_tokens
        if asked is not None and config.data.max_prompt_tokens + asked > shape.max_position_embeddings:
            raise ValueError(
                f"eval.sets {spec.name!r}: data.max_prompt_tokens + max_response_tokens must be at most the model's "
                f"{shape.max_position_embeddings} positions, got {config.data.max_prompt_tokens + asked}"
            )


def check_warm_start_missing(config: RunConfig, cache: Path, *, resumes: bool) -> None:
    """Refuses what needs a finished warm start and cannot make one."""
    replays = config.rollout.source is RolloutSource.replay
    for condition, reason in (
        (replays and not resumes, "with rollout.source=replay: it asks servers"),
        (not config.train.enabled, "with train.enabled=false"),
        (resumes and config.loss.kl_coef != 0.0, "to resume with loss.kl_coef: it is the reference model"),
    ):
        if condition:
            raise ValueError(f"warm_start.enabled must find a finished warm start in {cache} {reason}, got none")


def check_outside(config: RunConfig) -> None:
    """Looks at what the run will read: data files, tokenizer, running servers. For one rank only.

    Raises:
        ValueError: a broken data row (by file and line), a missing tokenizer, a server that does not answer.
    """
    if config.data.jsonl or config.advantage.K_by_source:
        known = {problem.data_source for problem in load_problems(config.data, config.reward).train}
        for entry in config.advantage.K_by_source:
            if entry.source not in known:
                raise ValueError(
                    f"advantage.K_by_source must name data sources of this run, {sorted(known)}, got {entry.source!r}"
                )
    if config.model.path is not None:
        Tokenizer.load(config.model.path)
    for url in config.rollout.urls:
        try:
            probe(url, timeout_s=PROBE_TIMEOUT_S)
        except EngineError as error:
            raise ValueError(
                f"rollout.urls must name running SGLang servers, but {url} does not answer: {error}"
            ) from error


def _check_model_source(config: RunConfig, shape: ModelShape | None) -> None:
    model = config.model
    if (model.path is None) == (model.scratch is None):
        raise ValueError(f"exactly one of model.path and model.scratch must be given, got {model.path!r} and "
                         f"{'a scratch model' if model.scratch else None}")  # fmt: skip
    if shape is not None:
        check_shape(config, shape)
    elif model.path is not None:
        folder = Path(model.path)
        if not folder.is_dir():
            raise ValueError(
                f"model.path must be a Hugging Face model folder, got {model.path!r}, which does not exist"
            )
        check_shape(config, ModelShape.from_hf(folder))


def _check_layout(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    for name in ("tp", "pp", "vpp", "ep", "cp"):
        if getattr(parallel, name) < 1:
            raise ValueError(f"parallel.{name} must be at least 1, got {getattr(parallel, name)}")
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_parallel:
        raise ValueError(
            f"world size must be a multiple of parallel.tp * parallel.pp * parallel.cp = {parallel.tp} * "
            f"{parallel.pp} * {parallel.cp}, got {world_size} (torchrun --nproc-per-node sets it)"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        raise NoEffectError(
            "parallel.sequence_parallel has no effect with parallel.tp = 1",
            option="parallel.sequence_parallel",
            because=["parallel.tp"],
        )
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ValueError(f"parallel.vpp must be 1 while parallel.pp is 1, got {parallel.vpp}")
    if parallel.cp > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(f"parallel.cp must be 1 without transformer-engine, got {parallel.cp}")
    if parallel.cp > 1:
        raise ValueError(f"parallel.cp must be 1: packed rollouts are not split over context ranks, got {parallel.cp}")


def _check_numbers(config: RunConfig) -> None:
    train, optim = config.train, config.optim
    for name, value in (
        ("train.steps", train.steps),
        ("train.updates_per_rollout", train.updates_per_rollout),
        ("train.max_tokens_per_microbatch", train.max_tokens_per_microbatch),
        ("sync.bucket_mb", config.sync.bucket_mb),
        ("sync.timeout_s", config.sync.timeout_s),
        ("sync.control_timeout_s", config.sync.control_timeout_s),
        ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        ("optim.lr", optim.lr),
        ("model.logits_mb", config.model.logits_mb),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (("train.seed", train.seed), ("data.seed", config.data.seed), ("eval.every", config.eval.every)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if config.rollout.prompts_per_step % train.updates_per_rollout:
        raise ValueError(
            f"rollout.prompts_per_step must be a multiple of train.updates_per_rollout ({train.updates_per_rollout}), "
            f"got {config.rollout.prompts_per_step}"
        )
    if optim.schedule is Schedule.constant and optim.min_lr_ratio != 0.0:
        raise NoEffectError(
            f"optim.min_lr_ratio has no effect with a constant schedule, got {optim.min_lr_ratio}",
            option="optim.min_lr_ratio",
            because=["optim.schedule"],
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if train.max_tokens_per_microbatch < longest:
        raise ValueError(
            f"train.max_tokens_per_microbatch must hold a prompt and its response (data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}), got {train.max_tokens_per_microbatch}"
        )
    if not (config.data.reasoning_gym or config.data.jsonl):
        raise ValueError("data.reasoning_gym or data.jsonl must name at least one source of problems, got neither")
    _check_eval(config.eval)


def _check_eval(evaluation: EvalConfig) -> None:
    check_sets(evaluation.sets, "eval.sets")
    if evaluation.num_samples < 1:
        raise ValueError(f"eval.num_samples must be at least 1, got {evaluation.num_samples}")
    if evaluation.num_samples > 1 and evaluation.temperature == 0.0:
        raise ValueError(
            f"eval.num_samples must be 1 with greedy decoding (eval.temperature=0), got {evaluation.num_samples}"
        )


def _check_rollout(rollout: RolloutConfig) -> None:
    for name in ("prompts_per_step", "group_size", "max_response_tokens", "concurrency"):
        if getattr(rollout, name) < 1:
            raise ValueError(f"rollout.{name} must be at least 1, got {getattr(rollout, name)}")
    if rollout.temperature <= 0:
        raise ValueError(f"rollout.temperature must be positive (responses are samples), got {rollout.temperature}")
    if rollout.discovery is not None and rollout.urls:
        raise ValueError(
            f"rollout.discovery must be null while rollout.urls names the servers, got {rollout.discovery!r}"
        )
    if rollout.discovery is None and rollout.min_servers != 1:
        raise ValueError(f"rollout.min_servers has no effect without rollout.discovery, got {rollout.min_servers}")
    if rollout.min_servers < 1:
        raise ValueError(f"rollout.min_servers must be at least 1, got {rollout.min_servers}")
    if rollout.router_url is not None and not rollout.urls:
        raise ValueError("rollout.router_url has no effect without rollout.urls: weights go to the servers themselves")
    if rollout.group_filter is GroupFilter.none and rollout.max_gen_batches != 10:
        raise NoEffectError(
            "rollout.max_gen_batches has no effect with rollout.group_filter=none",
            option="rollout.max_gen_batches",
            because=["rollout.group_filter"],
        )
    for name in ("request_timeout_s", "silence_timeout_s", "recovery_timeout_s"):
        if getattr(rollout, name) <= 0:
            raise ValueError(f"rollout.{name} must be positive, got {getattr(rollout, name)}")
    if rollout.urls or rollout.discovery is not None:
        if rollout.api_key_file is not None:
            read_key(rollout.api_key_file)
    else:
        check_listening(rollout.server.host, rollout.api_key_file)


def _check_checkpoint(config: RunConfig) -> None:
    checkpoint = config.checkpoint
    for name in ("every", "keep_every", "export_hf_every"):
        if getattr(checkpoint, name) < 0:
            raise ValueError(f"checkpoint.{name} must be at least 0, got {getattr(checkpoint, name)}")
    if checkpoint.keep_last < 1:
        raise ValueError(f"checkpoint.keep_last must be at least 1, got {checkpoint.keep_last}")
    if checkpoint.keep_every and not checkpoint.every:
        raise NoEffectError(
            f"checkpoint.keep_every has no effect while checkpoint.every is 0, got {checkpoint.keep_every}",
            option="checkpoint.keep_every",
            because=["checkpoint.every"],
        )
    if checkpoint.keep_every and checkpoint.keep_every % checkpoint.every:
        raise ValueError(
            f"checkpoint.keep_every must be a multiple of checkpoint.every ({checkpoint.every}), "
            f"got {checkpoint.keep_every}"
        )
    if checkpoint.keep_best and not (checkpoint.every and config.eval.every):
        raise NoEffectError(
            "checkpoint.keep_best has no effect without checkpoint.every and eval.every, got true",
            option="checkpoint.keep_best",
            because=["checkpoint.every", "eval.every"],
        )
    if checkpoint.keep_best and config.eval.every % checkpoint.every:
        raise ValueError(
            f"eval.every must be a multiple of checkpoint.every ({checkpoint.every}) with checkpoint.keep_best: "
            f"what was evaluated must be saved, got {config.eval.every}"
        )
    if config.train.max_bad_updates < 1:
        raise ValueError(f"train.max_bad_updates must be at least 1, got {config.train.max_bad_updates}")


def _check_source(config: RunConfig) -> None:
    rollout = config.rollout
    replays = rollout.source is RolloutSource.replay
    if replays and rollout.replay_from is None:
        raise ValueError("rollout.replay_from must be the folder rollouts of a run that recorded, got null")
    if rollout.replay_from is not None and not replays:
        raise ValueError(f"rollout.replay_from has no effect with rollout.source=live, got {rollout.replay_from!r}")
    if replays and not Path(rollout.replay_from or "").is_dir():
        raise ValueError(
            f"rollout.replay_from must be a folder with recorded rollouts, got {rollout.replay_from!r}, "
            f"which does not exist"
        )
    if replays and (rollout.record or rollout.urls or rollout.router_url):
        raise ValueError(
            "rollout.record, rollout.urls and rollout.router_url have no effect with rollout.source=replay"
        )
    if config.eval.sets and (replays or not config.train.enabled):
        raise NoEffectError(
            "eval.sets has no effect with rollout.source=replay or train.enabled=false: nothing is asked of them, "
            f"got {', '.join(spec.name for spec in config.eval.sets)}",
            option="eval.sets",
            because=["rollout.source", "train.enabled"],
        )
    if not config.train.enabled and replays:
        raise ValueError(
            "train.enabled must be true with rollout.source=replay: there is nothing else to do, got false"
        )
    if not config.train.enabled and config.checkpoint.export_hf_every:
        raise NoEffectError(
            f"checkpoint.export_hf_every has no effect with train.enabled=false, "
            f"got {config.checkpoint.export_hf_every}",
            option="checkpoint.export_hf_every",
            because=["train.enabled"],
        )


def _check_warm_start(warm: WarmStartConfig, *, scratch: bool) -> None:
    if not warm.enabled:
        for field in fields(warm):
            if getattr(warm, field.name) != getattr(WarmStartConfig(), field.name):
                raise NoEffectError(
                    f"warm_start.{field.name} has no effect while warm_start.enabled is false, "
                    f"got {getattr(warm, field.name)}",
                    option=f"warm_start.{field.name}",
                    because=["warm_start.enabled"],
                )
    if scratch and not warm.enabled:
        raise ValueError("warm_start.enabled must be true with model.scratch: random weights solve nothing")
    if not 0.0 < warm.target_accuracy <= 1.0:
        raise ValueError(f"warm_start.target_accuracy must be in (0, 1], got {warm.target_accuracy}")
