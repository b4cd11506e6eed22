"""Starts sglang-router: ``python -m megatron_rlvr.rollout.router --parent-pid PID --host H --port P --worker-urls U``.

The router spreads /generate over the servers, by common prefix and load. Pausing, aborting and updating weights are
not its business (it answers 404): those calls go to each server.
"""

from __future__ import annotations

import argparse
import sys

from megatron_rlvr.rollout import lifetime, ports
from megatron_rlvr.rollout.api_key import read_key


def main(argv: list[str]) -> None:
    """Routes until SIGTERM or SIGINT, or until the parent is gone."""
    parser = argparse.ArgumentParser(description="sglang-router that ends with its parent")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--api-key-file")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker-urls", nargs="+", required=True)
    args = parser.parse_args(argv)
    lifetime.end_with_parent(args.parent_pid)

    # not `sglang_router.launch_router`: that imports sglang itself for a debugging balancer, 500 MB and seconds
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    settings = RouterArgs(
        host=args.host,
        port=args.port,
        worker_urls=args.worker_urls,
        policy="cache_aware",
        # the default of 64 leaves one of two servers idle at the batch sizes of a small run
        balance_abs_threshold=4,
        worker_startup_check_interval=1,
        health_check_interval_secs=2,
        health_failure_threshold=2,
        health_success_threshold=1,
        # the client retries, and counts its retries; the router must not hide them
        disable_retries=True,
        disable_circuit_breaker=True,
        shutdown_grace_period_secs=2,
        # wanted from clients, and sent to the servers
        api_key=None if args.api_key_file is None else read_key(args.api_key_file),
        prometheus_host="127.0.0.1",
        # the default is one fixed port: two jobs on a machine would collide
        prometheus_port=ports.free_port("127.0.0.1"),
        log_level="warn",
    )
    Router.from_args(settings).start()


if __name__ == "__main__":
    main(sys.argv[1:])
