"""Submits one training as one Slurm job: trainer ranks, rollout servers, and requeueing until it is done.

    python slurm/submit.py experiment=NAME cluster=NAME [key=value ...] [--dry-run | --wait | --follow] [--no-preflight]

`cluster=` is a file of configs/cluster or the path of your own; `cluster.key=value` changes one of its fields
(megatron_rlvr/config/cluster.py says what they mean). Everything else is the run's own configuration, as for
`python -m megatron_rlvr.train`. Works from any folder; relative paths begin where you are.

The script, its log and what the job leaves lie in <output_dir>/<experiment_name>/<run_name>/job. Submitted again with
the same run_name, a run goes on from its newest checkpoint; --follow first looks for a job that works on it already or
has done it. Before anything is submitted, preflight looks at the run (tools/preflight.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.cluster import slurm
from megatron_rlvr.cluster.checks import (
    check_cluster,
    num_server_nodes,
    ranks_per_node,
    server_gpus,
    trainer_serves,
    world_size,
)
from megatron_rlvr.cluster.script import Job, render
from megatron_rlvr.config.cluster import ClusterConfig
from megatron_rlvr.config.compose import config_dir, load_cluster, load_config
from megatron_rlvr.config.schema import RunConfig

TEMPLATE = Path(__file__).resolve().parent / "train.sbatch"
USER_MISTAKE = 2
NAMES = ("experiment_name", "run_name", "output_dir")
"""Given by the run's folder, so that the script need not say them twice."""


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the cluster, and those of the run."""
    of_cluster = [each for each in overrides if each.lstrip("+~").partition("=")[0].split(".")[0] == "cluster"]
    return of_cluster, [each for each in overrides if each not in of_cluster]


def run_folder(config: RunConfig) -> Path:
    """Where the run writes; named by the time of submission where it has no name."""
    root = Path(config.output_dir).absolute() / config.experiment_name
    if config.run_name is not None:
        return root / config.run_name
    stem, number = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
    folder = root / stem
    while folder.exists():
        number += 1
        folder = root / f"{stem}-{number}"
    return folder


def plan(cluster: ClusterConfig, config: RunConfig, overrides: Sequence[str]) -> Job:
    """The job of a run; every value that the tasks need and the run's own options do not give."""
    if trainer_serves(config):
        cluster = replace(cluster, colocated=False)
    own = [each for each in overrides if each.lstrip("+").partition("=")[0] not in NAMES]
    server = config.rollout.server
    num_servers = num_server_nodes(cluster) * server.num_servers * server.dp
    if num_servers and config.rollout.min_servers == 1:
        own.append(f"rollout.min_servers={num_servers}")
    submits = cluster.container_image is None and cluster.venv is None and not cluster.modules
    return Job(
        name=config.experiment_name,
        run_dir=run_folder(config),
        overrides=tuple(own),
        workdir=Path.cwd(),
        source_dir=config_dir().parent if submits and config_dir().name == "configs" else None,
        python=sys.executable if submits else f"{cluster.venv}/bin/python" if cluster.venv is not None else "python",
        cluster=cluster,
    )


def check(cluster: ClusterConfig, config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Refuses what no job or run could be made of; warnings."""
    from megatron_rlvr.trainer.checks.configuration import check_config
    from megatron_rlvr.trainer.checks.giving_way import give_way

    warnings = check_cluster(cluster, config)
    in_job = replace(config)
    if num_server_nodes(cluster) and not trainer_serves(config):
        in_job.rollout = replace(config.rollout, discovery="the attempt's own folder")
    noted, _ = give_way(
        in_job,
        overrides,
        lambda: check_config(in_job, world_size=world_size(cluster), local_world_size=ranks_per_node(cluster)),
    )
    return [*warnings, *noted]


def look_ahead(cluster: ClusterConfig, config: RunConfig, overrides: Sequence[str]) -> bool:
    """Prints what preflight says of the run on this cluster; whether it may be submitted.

    Slurm's limits are asked where it answers; where it does not, sbatch says so in its own words.
    """
    from rich.console import Console

    from megatron_rlvr.trainer.preflight.inspection import Place, preflight
    from megatron_rlvr.trainer.preflight.report import print_report
    from megatron_rlvr.trainer.preflight.slurm import SlurmRequest

    apart = cluster.colocated and not trainer_serves(config)
    there = cluster.gpus_per_node + (server_gpus(cluster) if apart else 0)
    request = SlurmRequest(
        nodes=cluster.trainer_nodes + cluster.server_nodes,
        time_limit=cluster.time_limit,
        partition=cluster.partition,
        gpus_per_node=there,
    )
    place = Place(
        nodes=cluster.trainer_nodes,
        ranks_per_node=ranks_per_node(cluster),
        gpus_per_node=there,
        gpu_memory_gib=cluster.gpu_memory_gib,
        slurm=request if slurm.answers() else None,
    )
    # the servers are the job's own: they are looked at as if the trainer started them
    report = preflight(replace(config, rollout=replace(config.rollout, min_servers=1)), place, overrides=overrides)
    print_report(report, Console(stderr=True))
    return report.ok


def write_script(job: Job, text: str) -> Path:
    """Puts the script into the run's folder.

    Raises:
        ValueError: another job works on this run already.
    """
    folder = job.run_dir / "job"
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "job_id"
    if known.exists():
        try:
            state = slurm.job_state(int(known.read_text())).state
        except slurm.UnknownJobError:
            state = "COMPLETED"
        if state not in slurm.ENDED:
            raise ValueError(f"run_name must be of a run that no job works on, got {job.run_dir.name!r}: job "
                             f"{known.read_text().strip()} is {state}")  # fmt: skip
    script = folder / f"{job.name}.sbatch"
    script.write_text(text)
    return script


def submit(job: Job, text: str, *, wait: bool) -> int:
    """Submits, and follows the job if asked to; the exit status."""
    script = write_script(job, text)
    slurm.check_script(script)
    job_id = slurm.submit(script)
    (script.parent / "job_id").write_text(f"{job_id}\n")
    print(f"job {job_id}: run {job.run_dir}\n    log {job.log}", flush=True)
    return follow(job, job_id) if wait else 0


def take_up(job: Job) -> int | None:
    """Follows the job that works on this run already; its exit status, 0 also where one has done the run.

    None where there is none, or where it ended otherwise: a new job goes on from the newest checkpoint.
    """
    known = job.run_dir / "job" / "job_id"
    if not known.exists():
        return None
    job_id = int(known.read_text())
    left = job.run_dir / "job" / "exit_code"
    try:
        now = slurm.job_state(job_id)
    except slurm.UnknownJobError:
        done = left.exists() and left.read_text().strip() == "0"
    else:
        if now.state not in slurm.ENDED:
            print(f"job {job_id} works on this run already", flush=True)
            return follow(job, job_id)
        done = now.state == "COMPLETED" and now.exit_code == 0
    if done:
        print(f"job {job_id} has done this run", flush=True)
    return 0 if done else None


def follow(job: Job, job_id: int) -> int:
    """Shows a job's states and log until it has ended; its exit code, 130 when the watching was stopped."""
    try:
        code = slurm.follow(
            job_id,
            log=job.log,
            exit_code_file=job.run_dir / "job" / "exit_code",
            say=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print(f"job {job_id} goes on; to end it: scancel {job_id}", file=sys.stderr)
        return 130
    print(f"job {job_id} has ended with exit code {code}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, the job's own with --wait and --follow, 1 when Slurm refuses, 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="check everything and print the script; submit nothing")
    action.add_argument("--wait", action="store_true", help="follow state and log to the end; exit with the job's code")
    action.add_argument(
        "--follow",
        action="store_true",
        help="--wait, and a job of this run that is under way or done is taken up instead",
    )
    parser.add_argument("--no-preflight", action="store_true", help="do not look at data, memory, disk and packages")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=, cluster= and any field of them")
    options = parser.parse_intermixed_args(arguments)
    of_cluster, of_run = split_overrides(options.overrides)
    try:
        cluster, config = load_cluster(of_cluster), load_config(of_run)
        job = plan(cluster, config, of_run)
        for warning in check(cluster, config, of_run):
            print(f"warning: {warning}", file=sys.stderr)
        if options.follow and (code := take_up(job)) is not None:
            return code
        if not options.no_preflight and not look_ahead(cluster, config, of_run):
            print(
                "error: preflight found what would fail on the nodes (--no-preflight submits anyway)", file=sys.stderr
            )
            return 1
        text = render(TEMPLATE.read_text(), job)
        if options.dry_run:
            print(text, end="")
            return 0
        return submit(job, text, wait=options.wait or options.follow)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except slurm.SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
