"""Joins a process group with ranks of another program (the engines), beside torch's default group."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

BACKLOG = 1024
"""Ranks that may call at once."""


def open_store(host: str, *, timeout_s: float) -> dist.TCPStore:
    """A store at a port that the system picks, for the first rank of a group; waits for nobody.

    Torch's own listener sees IPv4 peers as mapped IPv6 addresses and asks DNS for their names as they come: without an
    answer that is five seconds for a group. So it gets one that knows IPv4 alone, wherever `host` does.

    Args:
        host: address or name under which the others reach this machine.
        timeout_s: bound of every wait.
    """
    try:
        socket.getaddrinfo(host, 0, socket.AF_INET)
    except socket.gaierror:
        return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    listener = socket.create_server(("", 0), family=socket.AF_INET, backlog=BACKLOG)
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, *, timeout_s: float) -> dist.TCPStore:
    """A store that another process has opened.

    Raises:
        torch.distributed.DistError: it did not answer within `timeout_s`.
    """
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join_group(
    store: dist.Store, *, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Meets the other ranks at a store and forms a process group with them.

    `torch.distributed.new_group` cannot do this: it only groups ranks of the default group. The engines build theirs
    the same way, so prefixes of the store must match: the group's name, then torch's own.

    Raises:
        torch.distributed.DistError: the others did not come within `timeout_s`.
    """
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=timeout_s),
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def leave_group(group: dist.ProcessGroup, *, broken: bool) -> None:
    """Leaves a group of `join_group`.

    Args:
        broken: a collective of it failed or hangs; without this, leaving would wait for it until its time-out.
    """
    if broken:
        backend = group._get_backend(torch.device("cpu" if group.name() == "gloo" else "cuda"))
        backend.abort()
    dist.destroy_process_group(group)
