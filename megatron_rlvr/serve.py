"""``python -m megatron_rlvr.serve experiment=NAME model.path=FOLDER [key=value ...]``: serves until SIGTERM or SIGINT.

Supervises SGLang servers apart from a trainer and registers them in ``rollout.discovery`` (default
``<output_dir>/<experiment_name>/servers``), where a trainer with the same ``rollout.discovery`` finds them; any number
of these commands, on any nodes that share the folder, may come and go. Logs and ``servers.json`` lie in a subfolder
named after the machine. Without `model.path`, the model is the one that the trainer says it works on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rlvr.config.compose import load_config
from megatron_rlvr.config.schema import RunConfig
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus, read_status
from megatron_rlvr.rollout.fleet import FleetSpec
from megatron_rlvr.rollout.membership import Registration, published_model
from megatron_rlvr.rollout.platform import gpu_available
from megatron_rlvr.rollout.supervisor import supervise

MODEL_POLL_S = 0.5
MODEL_NEWS_S = 30.0


def discovery_folder(config: RunConfig) -> Path:
    """Where servers of this configuration register."""
    folder = config.rollout.discovery or f"{config.output_dir}/{config.experiment_name}/servers"
    return Path(folder).resolve()


def model_path(config: RunConfig, on_wait: Callable[[str], None]) -> str:
    """The Hugging Face folder to serve: the given one, or what a trainer says.

    Raises:
        ValueError: there is no way to know one.
        TimeoutError: no trainer said one within `rollout.server.startup_timeout_s`.
    """
    if config.model.path is not None:
        return str(Path(config.model.path).resolve())
    if config.rollout.discovery is None:
        raise ValueError(
            "model.path must be a Hugging Face folder for serve, or rollout.discovery the folder in which a trainer "
            "tells its model, got null for both"
        )
    folder, patience_s = discovery_folder(config), config.rollout.server.startup_timeout_s
    started, last = time.monotonic(), -MODEL_NEWS_S
    while (path := published_model(folder)) is None:
        waited = time.monotonic() - started
        if waited > patience_s:
            raise TimeoutError(f"no trainer has told its model in {folder} within {patience_s:g} s")
        if waited - last >= MODEL_NEWS_S:
            last = waited
            on_wait(f"waiting for a trainer to tell its model in {folder}")
        time.sleep(MODEL_POLL_S)
    return path


def fleet_spec(config: RunConfig, *, path: str, folder: Path) -> FleetSpec:
    """What the configuration asks to serve.

    Args:
        config: of the run.
        path: Hugging Face folder.
        folder: for logs and `servers.json`.
    """
    return FleetSpec(
        server=config.rollout.server,
        model_path=path,
        dtype=config.rollout.server.dtype or config.model.dtype,
        gpu=gpu_available(),
        folder=folder,
        api_key_file=config.rollout.api_key_file and str(Path(config.rollout.api_key_file).resolve()),
    )


def serve(config: RunConfig) -> FleetStatus:
    """Serves until a signal or a failure; prints what happens; the last status.

    Raises:
        ValueError: `rollout.urls` names servers that run already, or there is no model to serve.
        TimeoutError: no trainer told which model to serve.
    """
    if config.rollout.urls:
        raise ValueError(f"rollout.urls must be empty for serve, which starts servers, got {config.rollout.urls}")
    path = model_path(config, lambda line: print(line, flush=True))
    # checked before anything is made
    fleet_spec(config, path=path, folder=discovery_folder(config))
    registration = Registration(discovery_folder(config))
    spec = fleet_spec(config, path=path, folder=registration.own_folder)
    print(f"serving {spec.model_path}; logs and servers.json in {spec.folder}", flush=True)
    done = threading.Event()
    reporter = threading.Thread(target=_report, args=(spec.folder, done), daemon=True)
    reporter.start()
    try:
        return supervise(spec, registration=registration)
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
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if status.state is FleetState.failed:
        print(f"error: {status.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
