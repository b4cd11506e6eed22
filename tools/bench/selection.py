"""Times the global token selection of Clip-Cov and KL-Cov over gloo processes on this machine.

    python tools/bench/selection.py [--tokens 2000000] [--ranks 2] [--ratio 2e-3] [--json FILE]

Prints one row per method and backend: the slowest rank's time, the minimum over repetitions. Each rank holds an equal
share of the tokens and uses the cores divided by the ranks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlvr.ops import select_tokens, set_backend
from megatron_rlvr.ops.backend import BACKENDS

RESPONSE_TOKENS = 1000
REPETITIONS = 7


def tokens_of(rank: int, num_ranks: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """A rank's share: whole responses of 1,000 tokens, half of the log-probs near 0 as in practice."""
    generator = torch.Generator().manual_seed(rank)
    size = num_tokens // num_ranks
    response = torch.arange(size) // RESPONSE_TOKENS
    logprobs = -torch.rand(size, generator=generator).pow(4) * 8
    return {
        "logprobs_T": logprobs,
        "advantages_T": torch.randn(int(response[-1]) + 1, generator=generator)[response],
        "mask_T": torch.ones(size, dtype=torch.bool),
        "trajectory_T": response * num_ranks + rank,
        "position_T": torch.arange(size) % RESPONSE_TOKENS,
    }


def run_rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One rank: times every combination and, on rank 0, writes the rows."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=arguments.ranks)
    batch = tokens_of(rank, arguments.ranks, arguments.tokens)
    rows = []
    for backend in BACKENDS:
        set_backend(backend)
        for method in ("kl_cov", "clip_cov"):
            seconds, selected = [], 0
            for _ in range(REPETITIONS):
                dist.barrier()
                start = time.perf_counter()
                chosen = select_tokens(**batch, method=method, ratio=arguments.ratio, group=dist.group.WORLD)
                spent = torch.tensor([time.perf_counter() - start])
                dist.all_reduce(spent, op=dist.ReduceOp.MAX)
                seconds.append(float(spent))
                count = chosen.sum()
                dist.all_reduce(count)
                selected = int(count)
            rows.append(
                {
                    "op": "select_tokens",
                    "impl": backend,
                    "method": method,
                    "tokens": arguments.tokens,
                    "ranks": arguments.ranks,
                    "ratio": arguments.ratio,
                    "selected": selected,
                    "total_ms": 1e3 * min(seconds),
                }
            )
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens over all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ratio", default="2e-3")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_rank, args=(rank, arguments, folder)) for rank in range(arguments.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a rank failed")
        rows = json.loads(Path(folder, "rows.json").read_text())
    print(f"{'method':<10}{'impl':<12}{'tokens':>10}{'ranks':>6}{'selected':>10}{'ms':>10}")
    for row in rows:
        print(
            f"{row['method']:<10}{row['impl']:<12}{row['tokens']:>10}{row['ranks']:>6}"
            f"{row['selected']:>10}{row['total_ms']:>10.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
