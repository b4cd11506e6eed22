"""Command lines of the processes that serve: pure functions from the configuration to argv and environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from megatron_rlvr.config.schema import DType, ServerConfig

CPU_TOTAL_TOKENS = 16384
"""KV slots where `server.max_total_tokens` is null and there is no GPU; SGLang would take most of the RAM."""
CPU_RUNNING_REQUESTS = 64
WEIGHT_LOADER = "megatron_rlvr.sync.engine_loader.load"
"""Takes weights slice by slice inside a server's ranks; the name is `sync.engine_loader.LOADER`."""

OWNED_FLAGS = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--host": "rollout.server.host",
    "--port": "a free port",
    "--dtype": "rollout.server.dtype",
    "--tp-size": "rollout.server.tp",
    "--tensor-parallel-size": "rollout.server.tp",
    "--dp-size": "rollout.server.dp",
    "--data-parallel-size": "rollout.server.dp",
    "--mem-fraction-static": "rollout.server.mem_fraction",
    "--max-total-tokens": "rollout.server.max_total_tokens",
    "--max-running-requests": "rollout.server.max_running_requests",
    "--base-gpu-id": "rollout.server.base_gpu_id",
    "--weight-version": "the version counter",
    "--enable-deterministic-inference": "rollout.server.deterministic",
    "--custom-weight-loader": "the trainer's own loader",
    "--api-key": "rollout.api_key_file",
}
"""SGLang flags that `rollout.server.extra_args` may not set, and what sets them instead."""

CPU_TUNING = {
    # A thread without work stays awake for a fifth of a millisecond (libgomp counts 100,000 turns to one): to wake it
    # for each of the hundred operations of a forward pass costs a sixth of a decoding step, and to spin on takes the
    # core from the process that answers HTTP.
    "GOMP_SPINCOUNT": "20000",
    # Tensors of one forward pass are made and freed thousands of times a second: glibc is not to give their memory back
    # each time, which costs a page fault for every 4 KiB at the next (a batch of 128 decodes three times as fast).
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Of servers without a GPU, where the user says nothing else."""

TRAINER_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    | {"ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"}
)
"""What torchrun tells its ranks: a server that saw it would take itself for one of them."""
TRAINER_PREFIX = "TORCHELASTIC_"
"""Likewise; with TORCHELASTIC_USE_AGENT_STORE a server would wait for ever for a store that nobody opens."""


def check_server(config: ServerConfig, *, gpu: bool) -> None:
    """Refuses values that no server could start with, or that would be ignored.

    Args:
        gpu: whether servers run on GPUs.

    Raises:
        ValueError: naming the field and the value.
    """
    for name in ("num_servers", "tp", "dp"):
        if getattr(config, name) < 1:
            raise ValueError(f"rollout.server.{name} must be at least 1, got {getattr(config, name)}")
    for name in ("max_total_tokens", "max_running_requests"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"rollout.server.{name} must be at least 1 or null, got {value}")
    if not 0.0 < config.mem_fraction < 1.0:
        raise ValueError(f"rollout.server.mem_fraction must be in (0, 1), got {config.mem_fraction}")
    if config.startup_timeout_s <= 0.0:
        raise ValueError(f"rollout.server.startup_timeout_s must be positive, got {config.startup_timeout_s}")
    if config.max_restarts < 0:
        raise ValueError(f"rollout.server.max_restarts must not be negative, got {config.max_restarts}")
    if config.base_gpu_id < 0:
        raise ValueError(f"rollout.server.base_gpu_id must not be negative, got {config.base_gpu_id}")
    if config.deterministic and not gpu:
        raise ValueError(
            "rollout.server.deterministic has no effect on a CPU, where rollouts follow their seeds anyway"
        )
    for arg in config.extra_args:
        flag = arg.partition("=")[0]
        if flag in OWNED_FLAGS:
            raise ValueError(f"rollout.server.extra_args must not hold {flag}: it is set by {OWNED_FLAGS[flag]}")


def server_arguments(
    config: ServerConfig,
    *,
    model_path: str,
    dtype: DType,
    port: int,
    index: int,
    gpu: bool,
    parent_pid: int,
    api_key_file: str | None = None,
) -> list[str]:
    """argv of one SGLang server.

    Args:
        config: the server group of the configuration.
        model_path: Hugging Face folder.
        dtype: given always: without it SGLang serves an fp32 checkpoint in fp16.
        port: TCP port on ``config.host``.
        index: which of the ``num_servers * dp`` engines; picks its GPUs.
        gpu: whether it runs on a GPU.
        parent_pid: the process with which the server shall end.
        api_key_file: file with the key that it wants; None: none.
    """
    argv = [sys.executable, "-m", "megatron_rlvr.rollout.launcher", "--parent-pid", str(parent_pid)]
    argv += _key_arguments(api_key_file)
    argv += ["--model-path", model_path, "--host", config.host, "--port", str(port)]
    argv += ["--dtype", dtype.value, "--tp-size", str(config.tp)]
    argv += ["--mem-fraction-static", str(config.mem_fraction)]
    # versions are policy versions; SGLang's own initial value, "default", is no number
    argv += ["--weight-version", "0", "--log-level-http", "warning"]
    argv += ["--custom-weight-loader", WEIGHT_LOADER]
    total_tokens, running_requests = config.max_total_tokens, config.max_running_requests
    if gpu:
        argv += ["--base-gpu-id", str(config.base_gpu_id + index * config.tp)]
        if api_key_file is not None:
            argv += ["--skip-server-warmup"]  # SGLang's own first request does not know the key
        argv += ["--enable-deterministic-inference"] if config.deterministic else []
    else:
        argv += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        argv += ["--disable-cuda-graph", "--skip-server-warmup"]
        # an idle scheduler would spin on a core that the trainer needs
        argv += ["--sleep-on-idle"]
        # There is no device to work while Python does: a step decided on before the last one's tokens are known only
        # decodes one token more of every request that has ended.
        argv += ["--disable-overlap-schedule"]
        total_tokens = total_tokens or CPU_TOTAL_TOKENS
        running_requests = running_requests or CPU_RUNNING_REQUESTS
    if total_tokens is not None:
        argv += ["--max-total-tokens", str(total_tokens)]
    if running_requests is not None:
        argv += ["--max-running-requests", str(running_requests)]
    return argv + list(config.extra_args)


def server_environment(
    inherited: Mapping[str, str], *, tp: int, num_engines: int, gpu: bool, cores: Sequence[int]
) -> dict[str, str]:
    """Environment of one SGLang server.

    Args:
        inherited: the environment to add to.
        tp: tensor-parallel size.
        num_engines: servers that share ``cores``.
        gpu: whether it runs on a GPU.
        cores: CPU cores this process may use.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in TRAINER_VARIABLES and not name.startswith(TRAINER_PREFIX)
    }
    # a paused engine cannot generate: with generation in it, /health would call every weight sync a failure
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    environment["PYTHONUNBUFFERED"] = "1"
    if not gpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["OMP_NUM_THREADS"] = str(max(1, len(cores) // (tp * num_engines)))
        tuning = dict(CPU_TUNING)
        if "OMP_WAIT_POLICY" in environment:
            del tuning["GOMP_SPINCOUNT"]  # libgomp would let it go before the user's word
        environment = tuning | environment
        if tp > 1:
            # without it SGLang wants a NUMA node for each rank
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = bind_cores(cores, tp)
    return environment


def bind_cores(cores: Sequence[int], num_ranks: int) -> str:
    """SGLang's core list per rank, e.g. ``"0,1|2,3"``; ranks share cores where there are fewer cores than ranks."""
    share = max(1, len(cores) // num_ranks)
    groups = [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def router_arguments(
    *, host: str, port: int, worker_urls: Sequence[str], parent_pid: int, api_key_file: str | None = None
) -> list[str]:
    """argv of the router before the servers."""
    argv = [sys.executable, "-m", "megatron_rlvr.rollout.router", "--parent-pid", str(parent_pid)]
    argv += _key_arguments(api_key_file)
    return [*argv, "--host", host, "--port", str(port), "--worker-urls", *worker_urls]


def _key_arguments(api_key_file: str | None) -> list[str]:
    """The name of the key's file: the key itself would be in the process list."""
    return [] if api_key_file is None else ["--api-key-file", api_key_file]
