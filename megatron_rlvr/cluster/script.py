"""Fills in slurm/train.sbatch for one job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.cluster.checks import num_server_nodes, ranks_per_node, server_gpus
from megatron_rlvr.config.cluster import ClusterConfig

WIDTH = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job to write a script for; every path is absolute."""

    name: str
    """Shown by squeue."""
    run_dir: Path
    """Folder of the run, on a file system that all nodes share; its log goes to ``<run_dir>/job``."""
    overrides: tuple[str, ...]
    """Of the run, as `megatron_rlvr.train` takes them."""
    workdir: Path
    """Where relative paths of the overrides begin."""
    source_dir: Path | None
    """Checkout to find the package in; None where the tasks' Python has it installed."""
    python: str
    """Runs the tasks."""
    cluster: ClusterConfig

    @property
    def log(self) -> Path:
        return self.run_dir / "job" / f"{self.name}.log"


def render(template: str, job: Job) -> str:
    """The template with its two marked blocks replaced: the resources, and the values of the settings.

    Comments of the settings stay, so that a script that was submitted can be read and changed by hand.

    Args:
        template: text of slurm/train.sbatch.
        job: what to write.

    Raises:
        ValueError: the template lacks a block, or a setting that a job needs.
    """
    text = _replace_block(template, "resources", lambda _: "\n".join(resources(job)))
    return _replace_block(text, "settings", lambda block: _assign(block, settings(job)))


def resources(job: Job) -> list[str]:
    """The lines of the resources block."""
    cluster = job.cluster
    per_node = ranks_per_node(cluster)
    leader = [
        f"--job-name={job.name}",
        f"--output={_quoted(str(job.log).replace('%', '%%'))}",
        "--open-mode=append",
        f"--chdir={_quoted(job.workdir)}",
        f"--signal=B:USR1@{cluster.stop_before_limit_s}",
    ]
    common = ["--requeue" if cluster.max_requeues else "--no-requeue", f"--time={cluster.time_limit}"]
    for option, value in (
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("reservation", cluster.reservation),
    ):
        common += [f"--{option}={value}"] if value is not None else []
    common += ["--exclusive"] if cluster.exclusive else []
    common += cluster.sbatch_options
    if cluster.colocated:
        cpus = per_node * cluster.cpus_per_rank + cluster.server_cpus_per_node
        trainer = [f"--nodes={cluster.trainer_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
        num_gpus = cluster.gpus_per_node + server_gpus(cluster)
    else:
        trainer = [f"--nodes={cluster.trainer_nodes}", f"--ntasks-per-node={per_node}"]
        trainer += [f"--cpus-per-task={cluster.cpus_per_rank}"]
        num_gpus = cluster.gpus_per_node
    trainer += _devices(cluster, num_gpus, cluster.memory)
    heading = "# the trainer" + (", with servers on its nodes" if cluster.colocated else "")
    lines = [f"#SBATCH {option}" for option in leader]
    lines += [heading, *(f"#SBATCH {option}" for option in [*trainer, *common])]
    if cluster.server_nodes:
        server = [f"--nodes={cluster.server_nodes}", "--ntasks-per-node=1"]
        server += [f"--cpus-per-task={cluster.server_cpus_per_node}"]
        server += _devices(cluster, server_gpus(cluster), cluster.server_memory)
        lines += ["# the servers", "#SBATCH hetjob", *(f"#SBATCH {option}" for option in [*server, *common])]
    return lines


def settings(job: Job) -> dict[str, str | int | Sequence[str]]:
    """Values of the settings block, by name; a sequence becomes an array."""
    cluster = job.cluster
    servers = "trainer" if cluster.colocated else "apart" if cluster.server_nodes else "none"
    return {
        "RUN_DIR": str(job.run_dir),
        "OVERRIDES": job.overrides,
        "SERVERS": servers,
        "RANKS_PER_NODE": ranks_per_node(cluster),
        "CPUS_PER_RANK": cluster.cpus_per_rank,
        "SERVER_CPUS": cluster.server_cpus_per_node,
        "GPUS": _gpus(cluster, cluster.gpus_per_node),
        "SERVER_GPUS": _gpus(cluster, server_gpus(cluster) if num_server_nodes(cluster) else 0),
        "MAX_REQUEUES": cluster.max_requeues,
        "STOP_BEFORE_LIMIT_S": cluster.stop_before_limit_s,
        "PYTHON": job.python,
        "SOURCE_DIR": str(job.source_dir or ""),
        "MODULES": cluster.modules,
        "SETUP": cluster.setup,
        "ENVIRONMENT": [f"{name}={value}" for name, value in cluster.environment.items()],
        "INTERFACE": cluster.network_interface or "",
        "CONTAINER": _container(job),
    }


def _container(job: Job) -> list[str]:
    if job.cluster.container_image is None:
        return []
    own = [f"{path}:{path}" for path in dict.fromkeys((job.workdir, job.run_dir))]
    return [
        f"--container-image={job.cluster.container_image}",
        f"--container-mounts={','.join([*own, *job.cluster.container_mounts])}",
        f"--container-workdir={job.workdir}",
    ]


def _devices(cluster: ClusterConfig, num_gpus: int, memory: str | None) -> list[str]:
    options = [f"--gpus-per-node={_gpus(cluster, num_gpus)}"] if num_gpus else []
    return options + ([f"--mem={memory}"] if memory is not None else [])


def _gpus(cluster: ClusterConfig, number: int) -> str:
    return f"{cluster.gres}:{number}" if cluster.gres is not None and number else str(number)


def _quoted(path: Path | str) -> str:
    """A value of an #SBATCH line, which knows quotes but no escapes."""
    text = str(path)
    if '"' in text or "\n" in text:
        raise ValueError(f"a folder of a job must have no quotes or line breaks in its name, got {text!r}")
    return f'"{text}"' if re.search(r"\s", text) else text


def _replace_block(text: str, name: str, change) -> str:
    pattern = re.compile(rf"^# >>> {name}\n(.*?)^# <<< {name}$", re.DOTALL | re.MULTILINE)
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"the template must have a block between '# >>> {name}' and '# <<< {name}', got none")
    new = f"# >>> {name}\n{change(match[1].rstrip())}\n# <<< {name}"
    return text[: match.start()] + new + text[match.end() :]


def _assign(block: str, values: Mapping[str, str | int | Sequence[str]]) -> str:
    """The block with the right-hand sides of its assignments replaced."""
    rest, lines = dict(values), []
    for line in block.splitlines():
        name = line.partition("=")[0]
        lines.append(f"{name}={_literal(rest.pop(name))}" if name in rest else line)
    if rest:
        raise ValueError(f"the template's settings must assign {', '.join(sorted(rest))}, got none of them")
    return "\n".join(lines)


def _literal(value: str | int | Sequence[str]) -> str:
    """A value as bash reads it."""
    if isinstance(value, int | str):
        return shlex.quote(str(value)) if value != "" else ""
    words = [shlex.quote(word) for word in value]
    if sum(map(len, words)) + len(words) < WIDTH:
        return f"({' '.join(words)})"
    return "(\n" + "".join(f"    {word}\n" for word in words) + ")"
