"""A Slurm cluster and what a job asks of it; composed by slurm/submit.py beside the run's own configuration."""

from dataclasses import dataclass, field

MISSING = "???"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """What `slurm/submit.py` turns into one job script.

    Server nodes are a second component of a heterogeneous job, each with a supervisor of
    `rollout.server.num_servers` * `rollout.server.dp` servers. With `colocated`, these supervisors run on the trainer's
    nodes, on GPUs of their own.
    """

    partition: str | None = None
    """Null: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time_limit: str = MISSING
    """As sbatch takes it: ``minutes``, ``hours:minutes:seconds`` or ``days-hours:minutes:seconds``. Slurm rounds it up
    to a minute. A job that needs longer goes on in its next time slot."""
    stop_before_limit_s: int = 300
    """Seconds before the time limit at which the job saves a checkpoint and requeues itself: above the time of the
    longest training step and of one checkpoint. Slurm may send the signal up to a minute earlier."""
    max_requeues: int = 3
    """Requeues in a row without a newer complete checkpoint after which the job gives up; 0: never requeue."""

    trainer_nodes: int = 1
    server_nodes: int = 1
    """0 when servers are colocated, or run already (`rollout.urls`)."""
    colocated: bool = False
    """Servers on the trainer's nodes; with ``sync.transport=colocated`` on its very GPUs."""
    gpus_per_node: int = 0
    """GPUs the trainer has on each of its nodes; 0: it runs on CPUs."""
    server_gpus_per_node: int | None = None
    """GPUs the servers have on each of their nodes. Null: as many as the trainer has on its nodes."""
    gres: str | None = None
    """Type of GPU where the cluster tells them apart, e.g. ``h100``."""
    gpu_memory_gib: float | None = None
    """Of one GPU, for preflight's estimate of what fits."""
    ranks_per_node: int | None = None
    """Trainer ranks on each node. Null: one for each GPU, or 1."""
    cpus_per_rank: int = 1
    server_cpus_per_node: int = 1
    memory: str | None = None
    """Of each trainer node, as sbatch takes it, e.g. ``200G`` or ``0`` for all. Null: the cluster's default."""
    server_memory: str | None = None
    """Of each server node, in the same form."""
    exclusive: bool = False
    """Whole nodes."""

    container_image: str | None = None
    """Image for pyxis and enroot (``registry#name:tag`` or a ``.sqsh`` file) that holds the package and all it needs.
    Null: no container."""
    container_mounts: list[str] = field(default_factory=list)
    """``from:to[:flags]``; the run's folder and the folder of submission are mounted anyway."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load on every node, in order."""
    venv: str | None = None
    """Virtual environment or conda prefix whose ``bin/python`` runs everything. Null: the environment that submits, or
    with modules or a container, their ``python``."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that every task runs before Python, e.g. ``ulimit -l unlimited``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every task. What is secret does not belong here: the script is readable by others."""
    network_interface: str | None = None
    """Interface for NCCL, gloo and the servers, e.g. ``ib0``. Null: the route between the nodes decides."""
    sbatch_options: list[str] = field(default_factory=list)
    """More ``#SBATCH`` options, of every component, e.g. ``--constraint=nvlink``."""
