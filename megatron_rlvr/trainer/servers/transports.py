"""Chooses the way of the weights from trainer to servers, and says why one that was asked for cannot be."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address

import torch

from megatron_rlvr.config.schema import RunConfig, Transport
from megatron_rlvr.policy import platform
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.weights import WeightBridge
from megatron_rlvr.rollout.address import address_facing
from megatron_rlvr.rollout.engine import ServerInfo
from megatron_rlvr.sync.broadcast import BroadcastTransport
from megatron_rlvr.sync.colocated import ColocatedTransport
from megatron_rlvr.sync.interfaces import Engine, WeightTransport
from megatron_rlvr.sync.shards import ShardTransport
from megatron_rlvr.sync.sliced import TrainerEnd
from megatron_rlvr.trainer.checks.transport import check_servers
from megatron_rlvr.trainer.servers.verifying import bucket_check


def make_transport(
    config: RunConfig,
    engines: Sequence[Engine],
    servers: Sequence[ServerInfo],
    *,
    weights: WeightBridge,
    parallel: ParallelContext,
) -> WeightTransport | None:
    """This rank's end of the configured transport, None for the disk; collective.

    Args:
        engines: every server, in the same order on all ranks.
        servers: what the same servers say about themselves.

    Raises:
        ValueError: the servers cannot take weights that way; names the server and the reason.
    """
    sync, ranks = config.sync, parallel.ranks
    if sync.transport is Transport.disk:
        return None
    host = sync.host or address_facing(server.url for server in servers)
    bucket_bytes = sync.bucket_mb << 20
    backend = "nccl" if platform.on_gpu() else "gloo"
    if sync.transport is Transport.broadcast:
        return BroadcastTransport(
            engines,
            stage=ranks.pp_rank,
            num_stages=ranks.pp_size,
            is_source=ranks.dp_rank == 0 and ranks.tp_rank == 0,
            host=host,
            bucket_bytes=bucket_bytes,
            backend=backend,
            timeout_s=sync.timeout_s,
            check=bucket_check(config, servers, weights.shape),
        )
    check_servers(sync.transport, servers)
    trainer = TrainerEnd(
        mapping=weights.mapping,
        dtype=getattr(torch, weights.units()[0][0].dtype),
        dp=ranks.world_size // (ranks.tp_size * ranks.pp_size),
        rank=ranks.rank,
        gate=parallel,
        host=_reachable(host, parallel),
    )
    if sync.transport is Transport.colocated:
        return ColocatedTransport(
            engines,
            trainer=trainer,
            ep=servers[0].ep_size,
            first_device=config.rollout.server.base_gpu_id,
            bucket_bytes=bucket_bytes,
            timeout_s=sync.timeout_s,
        )
    return ShardTransport(
        engines,
        trainer=trainer,
        ep=servers[0].ep_size,
        bucket_bytes=bucket_bytes,
        backend=backend,
        timeout_s=sync.timeout_s,
    )


def _reachable(host: str, parallel: ParallelContext) -> str:
    """An address of this machine that the other trainer ranks reach as well."""
    machines = parallel.gather_objects(socket.gethostname())
    if len(set(machines)) == 1 or not ip_address(host).is_loopback:
        return host
    return socket.gethostbyname(socket.gethostname())
