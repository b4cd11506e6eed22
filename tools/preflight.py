"""Looks at a run before any node is taken; says what will not work, what will not fit, and which option to change.

    python tools/preflight.py experiment=quickstart
    python tools/preflight.py experiment=qwen3_8b_base_qae --ranks-per-node 4 --gpus-per-node 8 --gpu-memory-gib 141 \\
        --model-config qwen3-8b-base
    python tools/preflight.py experiment=NAME --nodes 4 --ranks-per-node 8 --gpus-per-node 8 \\
        --slurm-time 24:00:00 --slurm-partition batch --slurm-nodes 6

Options of the run are given as for training (key=value). Exit status: 0 ready, 1 not ready, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from megatron_rlvr.config.compose import config_dir, load_config
from megatron_rlvr.trainer.preflight.inspection import Place, preflight
from megatron_rlvr.trainer.preflight.report import print_report
from megatron_rlvr.trainer.preflight.slurm import SlurmRequest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the trainer")
    parser.add_argument("--ranks-per-node", type=int, help="trainer ranks on each node; default: what the layout needs")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="GPUs of a node, servers' included; 0: no GPUs")
    parser.add_argument("--gpu-memory-gib", type=float, help="of one GPU; default: this machine's, if it has any")
    parser.add_argument("--model-config", metavar="FILE", help="config.json, or the name of a file in configs/models")
    parser.add_argument(
        "--slurm-time", metavar="LIMIT", help="time limit of the job; with it, Slurm's limits are asked"
    )
    parser.add_argument("--slurm-partition", metavar="NAME", help="default: the cluster's")
    parser.add_argument("--slurm-nodes", type=int, help="nodes of the whole job; default: --nodes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.overrides)
        place = _place(options, config.parallel.tp * config.parallel.pp * config.parallel.cp)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = preflight(config, place, model_config=_model_config(options.model_config), overrides=options.overrides)
    if options.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print_report(report, Console())
    return 0 if report.ok else 1


def _place(options: argparse.Namespace, layout_ranks: int) -> Place:
    for name in ("nodes", "ranks_per_node", "slurm_nodes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("slurm_partition", "slurm_nodes"):
        if getattr(options, name) is not None and options.slurm_time is None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --slurm-time")
    slurm = None
    if options.slurm_time is not None:
        slurm = SlurmRequest(
            nodes=options.slurm_nodes or options.nodes,
            time_limit=options.slurm_time,
            partition=options.slurm_partition,
            gpus_per_node=options.gpus_per_node,
        )
    return Place(
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node or -(-layout_ranks // options.nodes),
        gpus_per_node=options.gpus_per_node,
        gpu_memory_gib=options.gpu_memory_gib,
        slurm=slurm,
    )


def _model_config(name: str | None) -> Path | None:
    if name is None:
        return None
    shipped = config_dir() / "models" / f"{name}.json"
    return shipped if shipped.is_file() else Path(name)


if __name__ == "__main__":
    sys.exit(main())
