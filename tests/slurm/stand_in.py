"""Stands in for the Python of a job's tasks where only the job script and Slurm are tested: a training and a server
that keep the promises of the real ones (files, exit codes, signals) and cost nothing.

Called as ``python -m MODULE [key=value ...]``; what is asked of it comes as ``plan.*`` overrides, or as such in the
variable PLAN. The ranks meet where
the script told them to, over TCP; the server registers as a real one does; a checkpoint is an empty folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.config.checkpoints import EXIT_RESUMABLE
from megatron_rlvr.rollout import address
from megatron_rlvr.rollout.api_key import read_key
from megatron_rlvr.rollout.discovery import ProcessState, ProcessStatus
from megatron_rlvr.rollout.membership import Registration, current_servers

ANSWER_S = 120.0


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    pairs = (argument.lstrip("+").partition("=") for argument in arguments)
    return {key: value.strip("'") for key, _, value in pairs}


def main(module: str, arguments: list[str]) -> int:
    if module == "megatron_rlvr.rollout.address":
        return address.main(arguments)
    given = {
        "plan.step_s": "0.1",
        "rollout.min_servers": "1",
        **overrides_of([*arguments, *os.environ.get("PLAN", "").split()]),
    }
    return {"megatron_rlvr.train": train, "megatron_rlvr.serve": serve}[module](given)


def serve(given: dict[str, str]) -> int:
    if "plan.serve_exit" in given:
        return int(given["plan.serve_exit"])
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stop.append(number))
    server = ProcessStatus(
        name="server-0",
        url=f"http://{given['rollout.server.host']}:1",
        num_ranks=1,
        state=ProcessState.ready,
        pid=os.getpid(),
        restarts=0,
        log="",
        message="ready",
    )
    registration = Registration(Path(given["rollout.discovery"]))
    registration.publish([server])
    while not stop:
        registration.beat()
        time.sleep(0.05)
    registration.withdraw()
    return 0


def train(given: dict[str, str]) -> int:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = Path(given["output_dir"], given["experiment_name"], given["run_name"])
    signals: list[int] = []
    if "plan.deaf" not in given:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: signals.append(number))
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    links = meet(rank, world_size)
    if rank != 0:
        answer = links[0].recv(1)  # ends as rank 0 ends
        return answer[0] if answer else 1
    code = lead(given, run, signals, links)
    for link in links:
        with contextlib.suppress(OSError):
            link.sendall(bytes([code]))
    return code


def meet(rank: int, world_size: int) -> list[socket.socket]:
    """Rank 0 listens where all were told, the others come."""
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank != 0:
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                link = socket.create_connection(where)
                link.settimeout(None)
                return [link]
            except OSError:
                assert time.monotonic() < deadline, f"rank 0 does not answer at {where}"
                time.sleep(0.05)
    with socket.create_server(where) as listener:
        listener.settimeout(ANSWER_S)
        return [listener.accept()[0] for _ in range(world_size - 1)]


def lead(given: dict[str, str], run: Path, signals: list[int], links: list[socket.socket]) -> int:
    """Steps from the newest checkpoint on; what each attempt saw is kept beside the metrics."""
    if "plan.train_exit" in given:
        return int(given["plan.train_exit"])
    servers = []
    while "rollout.discovery" in given and len(servers) < int(given["rollout.min_servers"]):
        servers = current_servers(given["rollout.discovery"])
        time.sleep(0.05)
    names = ("SLURM_RESTART_COUNT", "SLURM_JOB_ID", "TMPDIR", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "PLANNED")
    seen = {name: os.environ[name] for name in names if name in os.environ}
    seen["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    seen["key"] = read_key(given["rollout.api_key_file"])
    seen["cwd"], seen["nodes"] = os.getcwd(), os.environ["SLURM_JOB_NODELIST"]
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with (run / "seen.jsonl").open("a") as file:
        file.write(json.dumps({**seen, "servers": [dataclasses.asdict(server) for server in servers]}) + "\n")
    done = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)
    for step in range(done + 1, int(given["train.steps"]) + 1):
        deadline = time.monotonic() + float(given["plan.step_s"])
        while time.monotonic() < deadline and not signals:
            time.sleep(0.02)
            if select.select(links, [], [], 0)[0]:
                print("a rank is gone", flush=True)
                return 1
        with (run / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        if signals or step % int(given["checkpoint.every"]) == 0:
            (run / "checkpoints" / f"step_{step:06d}").mkdir()
        if signals:
            return EXIT_RESUMABLE
        if str(step) == given.get("plan.crash_at"):
            return 1
    return 0


if __name__ == "__main__":
    assert sys.argv[1] == "-m"
    sys.exit(main(sys.argv[2], sys.argv[3:]))
