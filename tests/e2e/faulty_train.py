"""The training command in a world that goes wrong during weight syncs: run as `-m megatron_rlvr.train` would be.

Rank 0 counts transfers. From number `KILL_AT` on a server is killed between two buckets, from number `STALL_AT` on the
other trainer ranks are stopped for some seconds, from number `FLIP_AT` on a byte of a bucket turns, from number
`STOP_AT` on the launcher is asked to stop; each once, in the first transfer that gets so far: one that was prepared for
servers that have left or come since does not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_rlvr.policy.weights import WeightBridge
from megatron_rlvr.sync.broadcast import BroadcastTransport
from megatron_rlvr.sync.interfaces import BucketCallback, WeightSource
from megatron_rlvr.train import main
from megatron_rlvr.trainer.stopping import StopSignals

KILL_AT, STALL_AT, FLIP_AT, STOP_AT = 4, 7, 10, 13
STALL_S = 4.0


class Faults:
    """What has happened so far."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.sync = 0
        self.bucket = 0
        self.done: set[int] = set()
        self.asked = False

    def begin(self) -> None:
        self.sync += 1
        self.bucket = 0

    def on_gather(self) -> None:
        if self.sync >= STALL_AT and self._once(STALL_AT):
            stall_others()

    def on_bucket(self, bucket: torch.Tensor) -> torch.Tensor:
        self.bucket += 1
        if self.sync >= KILL_AT and self.bucket == 2 and self._once(KILL_AT):
            status = json.loads(next(self.out.glob("**/servers.json")).read_text())
            os.kill(status["servers"][1]["pid"], signal.SIGKILL)
        if self.sync >= FLIP_AT and self.bucket == 2 and self._once(FLIP_AT):
            bucket = bucket.clone()
            bucket[100] ^= 1
        if self.sync >= STOP_AT and self.bucket == 2 and self._once(STOP_AT):
            os.kill(os.getppid(), signal.SIGTERM)
            while not self.asked:  # it comes back to every rank
                time.sleep(0.01)
        return bucket

    def _once(self, number: int) -> bool:
        first = number not in self.done
        self.done.add(number)
        return first


def stall_others() -> None:
    """SIGSTOP to the other ranks, SIGCONT some seconds later."""
    others = [
        process
        for process in psutil.Process(os.getppid()).children()
        if process.pid != os.getpid() and process.environ().get("RANK") not in (None, "0")
    ]
    assert others, "there is another rank"
    for process in others:
        process.suspend()

    def go_on() -> None:
        for process in others:
            process.resume()

    threading.Timer(STALL_S, go_on).start()


def install(faults: Faults) -> None:
    """Puts the faults between the product's own parts."""
    prepare, gather, broadcast = BroadcastTransport.prepare, WeightBridge.gather, dist.broadcast
    on_signal = StopSignals._on_signal
    name_of = dist.distributed_c10d._world.pg_names

    def counted(self: BroadcastTransport, source: WeightSource, *, on_bucket: BucketCallback | None = None) -> None:
        faults.begin()
        prepare(self, source, on_bucket=on_bucket)

    def gathered(self: WeightBridge, unit: int, *, into: object) -> None:
        faults.on_gather()
        gather(self, unit, into=into)  # type: ignore[arg-type]

    def sent(tensor: torch.Tensor, src: int | None = None, group: object = None, **kwargs: object) -> object:
        if name_of.get(group, "").startswith("megatron_rlvr_stage"):  # type: ignore[call-overload]
            tensor = faults.on_bucket(tensor)
        return broadcast(tensor, src=src, group=group, **kwargs)  # type: ignore[arg-type]

    def asked(self: StopSignals, number: int, frame: FrameType | None) -> None:
        on_signal(self, number, frame)
        faults.asked = True

    StopSignals._on_signal = asked  # type: ignore[method-assign]
    BroadcastTransport.prepare = counted  # type: ignore[method-assign]
    WeightBridge.gather = gathered  # type: ignore[method-assign]
    dist.broadcast = sent  # type: ignore[assignment]


def send_small_buckets() -> None:
    """Several buckets of a tiny model, on every rank alike."""
    build = BroadcastTransport.__init__

    def built(self: BroadcastTransport, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "bucket_bytes": 1 << 16})

    BroadcastTransport.__init__ = built  # type: ignore[method-assign]


if __name__ == "__main__":
    send_small_buckets()
    if os.environ["RANK"] == "0":
        out = next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("output_dir="))
        install(Faults(Path(out)))
    main()
