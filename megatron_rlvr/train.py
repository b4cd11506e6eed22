"""Trains a policy: ``torchrun --nproc-per-node 2 -m megatron_rlvr.train experiment=quickstart key=value``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from megatron_rlvr.config.compose import config_dir, register_schema, to_run_config
from megatron_rlvr.config.schema import RunConfig

USER_MISTAKE = 2
FAILED = 1


def run(config: RunConfig, resolved_yaml: str) -> None:
    """Checks, trains and reports one run on this rank."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # Imported late: a mistake in the configuration answers before torch and Megatron are loaded.
    from megatron_rlvr.trainer.checks import check_config, check_outside

    warnings = check_config(config, world_size=world_size)
    if rank == 0:
        check_outside(config)

    from megatron_rlvr.policy.parallel import ParallelContext
    from megatron_rlvr.report.live_view import LiveView
    from megatron_rlvr.report.metrics_writer import MetricsWriter
    from megatron_rlvr.report.run_directory import RESOLVED_CONFIG, run_directory
    from megatron_rlvr.trainer.loop import train

    with ParallelContext(config.parallel, seed=config.train.seed) as parallel:
        if rank != 0:
            train(config, parallel, Path(parallel.broadcast_object(None)), None, None)
            return
        run_dir = run_directory(config.output_dir, config.experiment_name)
        (run_dir / RESOLVED_CONFIG).write_text(resolved_yaml)
        parallel.broadcast_object(str(run_dir))
        logging = config.logging
        with (
            MetricsWriter(
                run_dir,
                tensorboard=logging.tensorboard,
                wandb=logging.wandb,
                wandb_project=logging.wandb_project,
                config=OmegaConf.to_container(OmegaConf.create(resolved_yaml)),  # type: ignore[arg-type]
            ) as writer,
            LiveView(logging.console, config.train.steps, config.experiment_name) as view,
        ):
            for warning in warnings:
                view.note(f"warning: {warning}")
            summary = train(config, parallel, run_dir, view, writer)
    before = f"{summary.start_accuracy:.1%}" if summary.start_accuracy is not None else "not measured"
    print(f"held-out accuracy: {before} -> {summary.end_accuracy:.1%} on {summary.num_problems} problems "
          f"after {summary.steps} steps")  # fmt: skip
    print(f"report: {run_dir / 'report.html'}")
    if summary.model_dir is not None:
        print(f"model:  {summary.model_dir}")


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _main(composed: DictConfig) -> None:
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _stop)
    try:
        config = to_run_config(composed)
        run(config, OmegaConf.to_yaml(composed, resolve=True))
    except ValueError as error:
        # What rank 0 refuses, all ranks refuse for the same reason; one says so.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        if rank == 0:
            print("stopped", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def main() -> None:
    """Entry point of the command."""
    register_schema()
    hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_main)()


if __name__ == "__main__":
    main()
