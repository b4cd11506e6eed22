"""What a way of the weights to the servers cannot do, said before it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_rlvr.config.schema import RolloutConfig, RunConfig, Transport
from megatron_rlvr.rollout.arguments import WEIGHT_LOADER
from megatron_rlvr.rollout.engine import ServerInfo
from megatron_rlvr.weights.hf_config import ModelShape

CPU_FFN_MULTIPLE = 32
"""On a CPU SGLang pads feed-forward sizes to a multiple of this for each tensor-parallel rank."""


def with_padding(server: ServerInfo, shape: ModelShape) -> ServerInfo:
    """The server with the feed-forward size of this model among its oddities, where it pads it."""
    if server.device != "cpu":
        return server
    multiple = CPU_FFN_MULTIPLE * server.num_ranks
    experts = shape.num_experts > 0
    name = "moe_intermediate_size" if experts else "intermediate_size"
    size = shape.moe_ffn_hidden_size if experts else shape.ffn_hidden_size
    if size % multiple == 0:
        return server
    return replace(server, odd_layout=(*server.odd_layout, f"{name}={size} padded to a multiple of {multiple}"))


def check_servers(transport: Transport, servers: Sequence[ServerInfo]) -> None:
    """Refuses servers whose ranks cannot take slices.

    Raises:
        ValueError: naming the server and what it must be.
    """
    for server in servers:
        if WEIGHT_LOADER not in server.weight_loaders:
            raise ValueError(
                f"sync.transport={transport.value} needs servers started with --custom-weight-loader {WEIGHT_LOADER} "
                f"(python -m megatron_rlvr.serve starts them so), but {server.url} knows "
                f"{', '.join(server.weight_loaders) or 'no loader'}; sync.transport=broadcast needs none"
            )
        if server.odd_layout:
            raise ValueError(
                f"sync.transport={transport.value} cannot place slices in {server.url}, which runs with "
                f"{', '.join(server.odd_layout)}; sync.transport=broadcast leaves the placing to SGLang"
            )
        for name in ("num_ranks", "ep_size"):
            if getattr(server, name) != getattr(servers[0], name):
                raise ValueError(
                    f"sync.transport={transport.value} needs servers of one layout, but {name} is "
                    f"{getattr(servers[0], name)} at {servers[0].url} and {getattr(server, name)} at {server.url}"
                )


def check_transport(config: RunConfig, *, world_size: int, local_world_size: int) -> None:
    """Refuses what a transport cannot do, as far as the configuration shows it.

    Raises:
        ValueError: naming the field.
    """
    sync, rollout = config.sync, config.rollout
    if sync.release_memory and sync.transport is not Transport.colocated:
        raise ValueError(f"sync.release_memory has no effect with sync.transport={sync.transport.value}, got true")
    if sync.transport is not Transport.colocated:
        return
    for name, value in (("urls", rollout.urls), ("discovery", rollout.discovery)):
        if value:
            raise ValueError(
                f"rollout.{name} must be empty with sync.transport=colocated: the servers run on the trainer's own "
                f"devices and are started by it, got {value!r}"
            )
    if local_world_size != world_size:
        raise ValueError(
            f"sync.transport must not be colocated when trainer ranks are on several machines ({world_size} ranks, "
            f"{local_world_size} on this one): the servers are all on one"
        )
    server = rollout.server
    last = server.base_gpu_id + server.num_servers * server.dp * server.tp
    if last > world_size:
        raise ValueError(
            f"rollout.server.base_gpu_id + num_servers * dp * tp must be at most the trainer's {world_size} ranks with "
            f"sync.transport=colocated (every engine rank shares a trainer rank's device), got {last}"
        )


def with_memory_saver(config: RunConfig, *, gpu: bool) -> RolloutConfig:
    """The rollout configuration with what `sync.release_memory` needs of servers on a GPU."""
    if not (config.sync.release_memory and gpu):
        return config.rollout
    server = config.rollout.server
    return replace(config.rollout, server=replace(server, extra_args=[*server.extra_args, "--enable-memory-saver"]))
