"""Joins a process group with ranks of another program (the engines), beside torch's default group."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def free_port(host: str = "") -> int:
    """A TCP port that was free a moment ago on this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def join_group(
    *, master_address: str, master_port: int, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Meets the other ranks at a TCP store (held by rank 0) and forms a process group with them.

    `torch.distributed.new_group` cannot do this: it only groups ranks of the default group. The engines build theirs
    the same way, so prefixes of the store must match: the group's name, then torch's own.

    Raises:
        torch.distributed.DistError: the others did not come within `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    # Not torch's rendezvous("tcp://..."): under torchrun that would look for a store of the elastic agent.
    store = dist.TCPStore(
        master_address, master_port, world_size, is_master=rank == 0, timeout=timeout, multi_tenant=True
    )
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
