"""What a job asks of a cluster, checked against itself and the run before anything is submitted."""

from __future__ import annotations

import re

from megatron_rlvr.config.cluster import ClusterConfig
from megatron_rlvr.config.schema import Resume, RunConfig, Transport

MAX_SIGNAL_S = 65535
"""Slurm's bound on the time of --signal."""
OWNED_OPTIONS = {
    "--job-name": "experiment_name",
    "-J": "experiment_name",
    "--nodes": "cluster.trainer_nodes and cluster.server_nodes",
    "-N": "cluster.trainer_nodes and cluster.server_nodes",
    "--ntasks": "cluster.ranks_per_node",
    "-n": "cluster.ranks_per_node",
    "--ntasks-per-node": "cluster.ranks_per_node",
    "--cpus-per-task": "cluster.cpus_per_rank",
    "-c": "cluster.cpus_per_rank",
    "--gpus-per-node": "cluster.gpus_per_node",
    "--mem": "cluster.memory",
    "--time": "cluster.time_limit",
    "-t": "cluster.time_limit",
    "--partition": "cluster.partition",
    "-p": "cluster.partition",
    "--account": "cluster.account",
    "-A": "cluster.account",
    "--qos": "cluster.qos",
    "-q": "cluster.qos",
    "--reservation": "cluster.reservation",
    "--exclusive": "cluster.exclusive",
    "--signal": "cluster.stop_before_limit_s",
    "--requeue": "cluster.max_requeues",
    "--no-requeue": "cluster.max_requeues",
    "--output": "the run's folder",
    "-o": "the run's folder",
    "--chdir": "the folder of submission",
    "-D": "the folder of submission",
    "--open-mode": "the job's log, which requeued attempts continue",
    "--array": "a sweep (python -m megatron_rlvr.train -m)",
    "-a": "a sweep (python -m megatron_rlvr.train -m)",
}
"""sbatch options that `cluster.sbatch_options` may not hold, and what sets them instead."""
_TIME_FORMS = (
    (re.compile(r"(\d+)"), (60,)),
    (re.compile(r"(\d+):(\d+)"), (60, 1)),
    (re.compile(r"(\d+):(\d+):(\d+)"), (3600, 60, 1)),
    (re.compile(r"(\d+)-(\d+)"), (86400, 3600)),
    (re.compile(r"(\d+)-(\d+):(\d+)"), (86400, 3600, 60)),
    (re.compile(r"(\d+)-(\d+):(\d+):(\d+)"), (86400, 3600, 60, 1)),
)


def time_limit_s(text: str) -> int:
    """Seconds of a time limit in one of sbatch's forms, rounded up to a minute as Slurm does.

    Raises:
        ValueError: it is in none of them, or zero.
    """
    for pattern, units in _TIME_FORMS:
        if match := pattern.fullmatch(text):
            seconds = sum(int(part) * unit for part, unit in zip(match.groups(), units, strict=True))
            if seconds:
                return -(-seconds // 60) * 60
    raise ValueError(
        f"cluster.time_limit must be minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]], got {text!r}"
    )


def ranks_per_node(cluster: ClusterConfig) -> int:
    """Trainer ranks on each of the trainer's nodes."""
    return cluster.ranks_per_node or cluster.gpus_per_node or 1


def world_size(cluster: ClusterConfig) -> int:
    """Trainer ranks in all."""
    return cluster.trainer_nodes * ranks_per_node(cluster)


def server_gpus(cluster: ClusterConfig) -> int:
    """GPUs of the servers on each of their nodes."""
    return cluster.gpus_per_node if cluster.server_gpus_per_node is None else cluster.server_gpus_per_node


def trainer_serves(run: RunConfig) -> bool:
    """Whether the trainer starts its servers itself, on its own devices."""
    return run.sync.transport is Transport.colocated


def num_server_nodes(cluster: ClusterConfig) -> int:
    """Nodes on which servers run, the trainer's among them."""
    return cluster.trainer_nodes if cluster.colocated else cluster.server_nodes


def check_cluster(cluster: ClusterConfig, run: RunConfig) -> list[str]:
    """Refuses what no job could be made of, and options that would have no effect.

    Returns:
        Warnings worth a line.

    Raises:
        ValueError: naming the field, what it must be and what it was.
    """
    _check_numbers(cluster)
    _check_servers(cluster, run)
    _check_environment(cluster)
    _check_options(cluster)
    if run.rollout.discovery is not None:
        raise ValueError(f"rollout.discovery must be null: each attempt of a job has its own, got "
                         f"{run.rollout.discovery!r}")  # fmt: skip
    if run.checkpoint.resume is not Resume.auto:
        raise ValueError(f"checkpoint.resume must be auto in a job that requeues itself, got "
                         f"{run.checkpoint.resume.name}")  # fmt: skip
    if cluster.max_requeues and not run.checkpoint.every:
        return ["checkpoint.every is 0: after the loss of a node the run begins again from its start"]
    return []


def _check_numbers(cluster: ClusterConfig) -> None:
    least = {
        "trainer_nodes": 1,
        "server_nodes": 0,
        "gpus_per_node": 0,
        "gpu_memory_gib": 1,
        "server_gpus_per_node": 0,
        "ranks_per_node": 1,
        "cpus_per_rank": 1,
        "server_cpus_per_node": 1,
        "max_requeues": 0,
        "stop_before_limit_s": 10,
    }
    for name, bound in least.items():
        value = getattr(cluster, name)
        if value is not None and value < bound:
            raise ValueError(f"cluster.{name} must be at least {bound}, got {value}")
    limit = time_limit_s(cluster.time_limit)
    if not cluster.stop_before_limit_s < min(limit, MAX_SIGNAL_S + 1):
        raise ValueError(
            f"cluster.stop_before_limit_s must be less than cluster.time_limit ({limit} s) and at most {MAX_SIGNAL_S}, "
            f"got {cluster.stop_before_limit_s}"
        )
    if cluster.gpus_per_node and ranks_per_node(cluster) != cluster.gpus_per_node:
        raise ValueError(
            f"cluster.ranks_per_node must be one for each GPU (cluster.gpus_per_node={cluster.gpus_per_node}), "
            f"got {cluster.ranks_per_node}"
        )


def _check_servers(cluster: ClusterConfig, run: RunConfig) -> None:
    if run.rollout.urls and (cluster.server_nodes or cluster.colocated):
        raise ValueError(
            f"cluster.server_nodes must be 0 and cluster.colocated false while rollout.urls names running servers, "
            f"got {cluster.server_nodes} and {str(cluster.colocated).lower()}"
        )
    if trainer_serves(run) and not (cluster.colocated and cluster.server_gpus_per_node in (None, 0)):
        raise ValueError(
            "cluster.colocated must be true and cluster.server_gpus_per_node null with sync.transport=colocated: the "
            f"trainer starts servers on its own GPUs, got {str(cluster.colocated).lower()} and "
            f"{cluster.server_gpus_per_node}"
        )
    if cluster.colocated and cluster.server_nodes:
        raise ValueError(
            f"cluster.server_nodes must be 0 with cluster.colocated: servers are on the trainer's nodes, "
            f"got {cluster.server_nodes}"
        )
    if not (run.rollout.urls or cluster.server_nodes or cluster.colocated):
        raise ValueError(
            "cluster.server_nodes must be at least 1, or cluster.colocated true, or rollout.urls name running "
            "servers, got none of them"
        )
    if cluster.server_memory is not None and not cluster.server_nodes:
        raise ValueError(
            f"cluster.server_memory has no effect without nodes of the servers' own, got {cluster.server_memory!r}"
        )
    if not num_server_nodes(cluster):
        if cluster.server_gpus_per_node is not None:
            raise ValueError(
                f"cluster.server_gpus_per_node has no effect without servers, got {cluster.server_gpus_per_node}"
            )
        return
    if trainer_serves(run):
        return
    server = run.rollout.server
    wanted, there = server.num_servers * server.dp * server.tp, server_gpus(cluster)
    if there and wanted > there:
        raise ValueError(
            f"rollout.server.num_servers * dp * tp must be at most the {there} GPUs that servers have on a node "
            f"(cluster.server_gpus_per_node), got {server.num_servers} * {server.dp} * {server.tp}"
        )


def _check_environment(cluster: ClusterConfig) -> None:
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"cluster.environment must map names of variables, got {name!r}")
    if cluster.container_image is None and cluster.container_mounts:
        raise ValueError(
            f"cluster.container_mounts has no effect without cluster.container_image, got {cluster.container_mounts}"
        )
    if cluster.container_image is not None and cluster.modules:
        raise ValueError(f"cluster.modules must be empty in a container, which has its own, got {cluster.modules}")
    for mount in cluster.container_mounts:
        if not re.fullmatch(r"[^:,]+:[^:,]+(:[^:,]+)?", mount):
            raise ValueError(f"cluster.container_mounts must be from:to[:flags], got {mount!r}")


def _check_options(cluster: ClusterConfig) -> None:
    if cluster.gpu_memory_gib is not None and not (cluster.gpus_per_node or cluster.server_gpus_per_node):
        raise ValueError(
            f"cluster.gpu_memory_gib has no effect without GPUs (cluster.gpus_per_node), got {cluster.gpu_memory_gib}"
        )
    if cluster.gres is not None and not (cluster.gpus_per_node or cluster.server_gpus_per_node):
        raise ValueError(f"cluster.gres has no effect without GPUs (cluster.gpus_per_node), got {cluster.gres!r}")
    for option in cluster.sbatch_options:
        flag = re.match(r"--[\w-]+|-\w", option)
        if flag is None or "\n" in option:
            raise ValueError(f"cluster.sbatch_options must be options such as --constraint=nvlink, got {option!r}")
        if flag[0] in OWNED_OPTIONS:
            raise ValueError(
                f"cluster.sbatch_options must not hold {flag[0]}: it is set by {OWNED_OPTIONS[flag[0]]}, got {option!r}"
            )
    texts = {
        **{name: getattr(cluster, name) for name in ("partition", "account", "qos", "reservation", "gres", "venv")},
        **{name: getattr(cluster, name) for name in ("memory", "server_memory", "network_interface")},
        "container_image": cluster.container_image,
    }
    for name, text in texts.items():
        if text is not None and (not text or re.search(r"[\s\"']", text)):
            raise ValueError(f"cluster.{name} must be a word without spaces and quotes, got {text!r}")
