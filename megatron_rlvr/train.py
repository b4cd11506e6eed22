"""Trains a policy: ``torchrun --nproc-per-node 2 -m megatron_rlvr.train experiment=quickstart key=value``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from megatron_rlvr.config.compose import config_dir, register_schema, to_run_config
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.trainer import endings
from megatron_rlvr.trainer.launcher_watch import follow_launcher
from megatron_rlvr.trainer.stopping import RunInterruptedError, StopSignals


def run(composed: DictConfig, overrides: Sequence[str], stop: StopSignals) -> None:
    """Checks, trains and reports one run on this rank.

    Args:
        composed: the configuration as Hydra composed it.
        overrides: what the user typed, ``key=value`` each.
        stop: requests to stop that reach this process.
    """
    config = to_run_config(composed)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # Imported late: a mistake in the configuration answers before torch and Megatron are loaded.
    from megatron_rlvr.rollout.api_key import use_key_file
    from megatron_rlvr.trainer.checks.configuration import check_config, check_outside
    from megatron_rlvr.trainer.checks.giving_way import give_way
    from megatron_rlvr.trainer.checks.server_options import check_server_options

    use_key_file(config.rollout.api_key_file)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    warnings, left_out = give_way(
        config,
        overrides,
        lambda: check_config(config, world_size=world_size, local_world_size=local_world_size),
    )
    for option in left_out:
        OmegaConf.update(composed, option, OmegaConf.select(OmegaConf.structured(RunConfig), option))
    resolved_yaml = OmegaConf.to_yaml(composed, resolve=True)
    if in_vain := check_server_options(config.rollout, overrides):
        warnings.append(f"rollout.urls takes the place of the experiment's own servers ({', '.join(in_vain)})")
    if rank == 0:
        check_outside(config)

    from megatron_rlvr.policy.parallel import ParallelContext
    from megatron_rlvr.policy.peer_watch import PeerWatch
    from megatron_rlvr.report.live_view import LiveView
    from megatron_rlvr.report.metrics_writer import MetricsWriter
    from megatron_rlvr.report.run_directory import RESOLVED_CONFIG, run_directory
    from megatron_rlvr.report.run_record import RunRecord
    from megatron_rlvr.trainer.loop import train

    stop.begin()
    with (
        ParallelContext(config.parallel, seed=config.train.seed) as parallel,
        PeerWatch(parallel, shared=endings.shared_errors()),
    ):
        if rank != 0:
            train(config, parallel, Path(parallel.broadcast_object(None)), None, None, stop)
            return
        run_dir = run_directory(config.output_dir, config.experiment_name, config.run_name)
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
            ) as metrics,
            RunRecord(metrics) as record,
            LiveView(logging.console, config.train.steps, config.experiment_name) as view,
        ):
            for warning in warnings:
                view.note(f"warning: {warning}")
            summary = train(config, parallel, run_dir, view, record, stop)
    if config.train.enabled:
        print(f"held-out accuracy: {_share(summary.start_accuracy)} -> {_share(summary.end_accuracy)} "
              f"on {summary.num_problems} problems after {summary.steps} steps")  # fmt: skip
    print(f"report: {run_dir / 'report.html'}")
    if summary.model_dir is not None:
        print(f"model:  {summary.model_dir}")


def _share(accuracy: float | None) -> str:
    return f"{accuracy:.1%}" if accuracy is not None else "not measured"


def _main(composed: DictConfig) -> None:
    rank = int(os.environ.get("RANK", "0"))
    stop = StopSignals(leave=endings.leave)
    stop.install()
    follow_launcher(stop)
    try:
        run(composed, HydraConfig.get().overrides.task, stop)
    except (Exception, KeyboardInterrupt) as caught:
        stop.release()
        error: BaseException = stop.interruption or caught
        if stop.reason is not None and endings.is_lost_connection(caught):
            # All ranks were asked to stop, and another one was faster.
            error = RunInterruptedError(stop.reason)
        ending = endings.ending_of(error, rank=rank)
        endings.tell_torchrun(ending.text if ending else f"{type(error).__name__}: {error}")
        if ending is None:
            raise
        # What rank 0 refuses, all ranks refuse for the same reason; one says so.
        if rank == 0 or ending.everywhere:
            print(ending.text, file=sys.stderr, flush=True)
        else:
            endings.let_main_speak()
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            # A sweep goes on with its other jobs, and a launcher keeps an exception where it would lose an exit.
            raise RuntimeError(f"{ending.text} (exit code {ending.code})") from error
        sys.exit(ending.code)


def main() -> None:
    """Entry point of the command."""
    register_schema()
    with endings.SafeExit():
        hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_main)()


if __name__ == "__main__":
    main()
