"""The process that owns the servers: ``python -m megatron_rlvr.rollout.supervisor --parent-pid PID SPEC.json``.

The trainer starts it for its local servers; `megatron_rlvr.serve` runs the same in its own process. It imports
neither torch nor sglang.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from megatron_rlvr.rollout import lifetime
from megatron_rlvr.rollout.api_key import use_key_file
from megatron_rlvr.rollout.discovery import FleetState, FleetStatus
from megatron_rlvr.rollout.fleet import FleetSpec, ServerFleet
from megatron_rlvr.rollout.membership import Registration


def supervise(
    spec: FleetSpec, *, parent_pid: int | None = None, registration: Registration | None = None
) -> FleetStatus:
    """Serves until SIGTERM, SIGINT, SIGHUP or SIGUSR1, or until nothing is left to serve; the last status.

    A second signal, or the parent's end, kills the servers without grace. Call it from the main thread.

    Args:
        spec: what to serve.
        parent_pid: the process with which to end; None: none.
        registration: where trainers on other nodes find the servers.
    """
    use_key_file(spec.api_key_file)
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    def on_orphaned() -> None:
        hurry.set()
        stop.set()

    # srun passes SIGUSR1 on to its tasks and meets SIGTERM by killing them
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, on_signal)
    if parent_pid is not None:
        lifetime.watch_parent(parent_pid, on_orphaned)
    return ServerFleet(spec, registration).run(stop, hurry=hurry)


def main(argv: list[str]) -> int:
    """Exit status 0 after a stop, 1 when the servers failed."""
    parser = argparse.ArgumentParser(description="supervises SGLang servers")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("spec", type=Path)
    args = parser.parse_args(argv)
    status = supervise(FleetSpec.from_json(args.spec.read_text()), parent_pid=args.parent_pid)
    if status.state is FleetState.failed:
        print(status.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
