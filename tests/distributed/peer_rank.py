"""A rank that watches its peers: ``peer_rank.py CASE``; rank 0 waits for no collective."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from megatron_rlvr.config.schema import ParallelConfig
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.peer_watch import SILENCE_S, PeerLostError, PeerWatch


def main(case: str) -> None:
    try:
        silence_s = 3.0 if case == "stalled" else SILENCE_S
        with (
            ParallelContext(ParallelConfig(), seed=0) as parallel,
            PeerWatch(parallel, shared=(ValueError,), silence_s=silence_s),
        ):
            parallel.barrier()
            rank = parallel.ranks.rank
            pids = parallel.gather_objects(os.getpid())
            match case, rank:
                case "killed", 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stalled", 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "main killed", 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                case "failed", 1:
                    raise ArithmeticError("one and one is three\nand more")
                case "refused", _:
                    raise ValueError("all alike")
                case "in order", _:
                    return
            if rank == 0 or case == "main killed":
                threading.Event().wait()  # as for rollouts: nothing but the watch ends it
            dist.all_reduce(torch.ones(1))
    except PeerLostError as error:
        print(f"lost rank {error.rank}: {error}")
        if case == "stalled" and rank == 0:
            os.kill(pids[1], signal.SIGKILL)
    except ValueError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
