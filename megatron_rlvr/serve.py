"""``python -m megatron_rlvr.serve experiment=NAME model.path=FOLDER [key=value ...]``: serves until SIGTERM or SIGINT.

Supervises SGLang servers apart from a trainer and tells where they are in ``<rollout.discovery>/servers.json``
(default ``<output_dir>/<experiment_name>/servers``). A trainer takes their URLs as ``rollout.urls``.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from megatron_rlvr.config.compose import load_config
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus, read_status
from megatron_rlvr.rollout.fleet import FleetSpec
from megatron_rlvr.rollout.platform import gpu_available
from megatron_rlvr.rollout.supervisor import supervise


def fleet_spec(config: RunConfig) -> FleetSpec:
    """What the configuration asks to serve.

    Raises:
        ValueError: there is no model folder to serve, or `rollout.urls` names servers that run already.
    """
    if config.rollout.urls:
        raise ValueError(f"rollout.urls must be empty for serve, which starts servers, got {config.rollout.urls}")
    if config.model.path is None:
        raise ValueError("model.path must be a Hugging Face folder for serve, got null")
    folder = config.rollout.discovery or f"{config.output_dir}/{config.experiment_name}/servers"
    return FleetSpec(
        server=config.rollout.server,
        model_path=str(Path(config.model.path).resolve()),
        dtype=config.rollout.server.dtype or config.model.dtype,
        gpu=gpu_available(),
        folder=Path(folder).resolve(),
    )


def serve(config: RunConfig) -> FleetStatus:
    """Serves until a signal or a failure; prints what happens; the last status."""
    spec = fleet_spec(config)
    print(f"serving {spec.model_path}; logs and discovery file in {spec.folder}", flush=True)
    done = threading.Event()
    reporter = threading.Thread(target=_report, args=(spec.folder, done), daemon=True)
    reporter.start()
    try:
        return supervise(spec)
    finally:
        done.set()
        reporter.join()


def _report(folder: Path, done: threading.Event) -> None:
    """Prints a line at every change of a process's state."""
    seen: dict[str, str] = {}
    while not done.wait(0.5):
        status = read_status(folder)
        for process in [*status.servers, *([status.router] if status.router else [])] if status else []:
            line = f"{process.name} {process.url} {process.state.value}, {process.restarts} restarts"
            if seen.get(process.name) != line:
                seen[process.name] = line
                print(line, flush=True)


def main() -> int:
    """Exit status 0 after a stop, 1 when the servers failed, 2 for a wrong configuration."""
    try:
        status = serve(load_config(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if status.state is FleetState.failed:
        print(f"error: {status.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
