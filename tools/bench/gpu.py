"""Log-prob and entropy of vocabulary logits on one GPU: ours beside eager PyTorch, torch.compile and Megatron's.

    python tools/bench/gpu.py [--tokens 8192 32768] [--columns 151936 37984 18992] [--dtype bf16] [--json FILE]

One call, under 8 minutes on an H200. First the ceilings of this GPU: a device copy (read and write), a reduction
(read), an in-place product (read and write). Then, per size, the median forward and forward+backward time of every
implementation; GB/s counts the least bytes that the work needs (each logit read once forward; read and written once
backward), and `of copy` is that over the measured copy speed. `peak MB` is what is allocated beyond the logits.
`megatron` is Megatron-Core's fused vocabulary-parallel cross entropy: the log-prob alone, no entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import PEERS, LogprobEntropy

from megatron_rlvr import ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_ROWS = 8
BUDGET_S = 460.0


def native(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, as the trainer calls it: the gradient is written over the logits."""
    return ops.vocab_parallel_logprob_entropy(logits_TV, targets_T, inplace_backward=True)


def native_new_gradient(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, leaving the logits as they are."""
    return ops.vocab_parallel_logprob_entropy(logits_TV, targets_T)


def megatron() -> LogprobEntropy | None:
    """Megatron's fused cross entropy on a group of one rank, or None where megatron is not installed."""
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError:
        return None
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    group = torch.distributed.group.WORLD

    def run(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_T = -fused_vocab_parallel_cross_entropy(logits_TV[:, None], targets_T[:, None], group)[:, 0]
        return logprobs_T, torch.zeros_like(logprobs_T)

    return run


def implementations() -> dict[str, LogprobEntropy]:
    """By the name in the table."""
    found: dict[str, LogprobEntropy] = {"native": native, "native_new_gradient": native_new_gradient}
    found |= {name: PEERS[name] for name in ("eager", "compiled")}
    fused = megatron()
    return found if fused is None else found | {"megatron": fused}


def median_ms(run: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Median device time of ``run`` in ms, after two warm-ups; ``prepare`` runs untimed before each."""
    times = []
    for round_ in range(rounds + 2):
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if round_ >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def ceilings(rounds: int) -> dict[str, float]:
    """GB/s of this GPU for a copy, a read and an in-place read and write, over 4 GiB."""
    source = torch.randn(1 << 31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    moved = source.nbytes / 1e6  # MB, so that MB/ms is GB/s
    return {
        "copy": 2 * moved / median_ms(lambda: target.copy_(source), rounds),
        "read": moved / median_ms(lambda: source.view(torch.int16).amax(), rounds),
        "in_place": 2 * moved / median_ms(lambda: target.mul_(1.0), rounds),
    }


class Case:
    """Logits of one size on the device, and the float64 answers for its first rows."""

    def __init__(self, tokens: int, columns: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.source_TV = torch.empty(tokens, columns, dtype=dtype, device="cuda").normal_(std=2.0, generator=generator)
        self.targets_T = torch.randint(columns, (tokens,), device="cuda", generator=generator)
        self.upstream = list(torch.randn(2, tokens, device="cuda", generator=generator))
        self.buffer_TV = self.source_TV.clone().requires_grad_()
        rows = min(CHECKED_ROWS, tokens)
        exact = self.source_TV[:rows].double().requires_grad_()
        log_p = exact.log_softmax(dim=1)
        outputs = [log_p.gather(1, self.targets_T[:rows, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)]
        torch.autograd.backward(outputs, [g[:rows].double() for g in self.upstream])
        self.rows, self.exact = rows, [*(output.detach() for output in outputs), exact.grad]

    def reset(self) -> None:
        """The logits as they were."""
        self.buffer_TV.grad = None
        with torch.no_grad():
            self.buffer_TV.copy_(self.source_TV)

    def forward(self, run: LogprobEntropy) -> tuple[torch.Tensor, torch.Tensor]:
        return run(self.buffer_TV.view_as(self.buffer_TV), self.targets_T)

    def both(self, run: LogprobEntropy) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.forward(run)
        used = [(o, g) for o, g in zip(outputs, self.upstream, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in used], [g for _, g in used])
        return outputs

    def errors(self, run: LogprobEntropy) -> list[float]:
        self.reset()
        outputs = self.both(run)
        got = [outputs[0].detach(), outputs[1].detach(), self.buffer_TV.grad]
        return [float((g[: self.rows].double() - want).abs().max()) for g, want in zip(got, self.exact, strict=True)]


def measure(name: str, run: LogprobEntropy, case: Case, rounds: int, copy_gbs: float) -> dict[str, object]:
    """One row of the table."""
    tokens, columns = case.source_TV.shape
    logits_mb = case.source_TV.nbytes / 1e6
    row: dict[str, object] = {
        "op": "vocab_parallel_logprob_entropy",
        "impl": name,
        "tokens": tokens,
        "vocab": columns,
        "dtype": str(case.source_TV.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(),
    }
    try:
        errors = case.errors(run)
        case.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.both(run)
        peak = torch.cuda.max_memory_allocated() - before
        # Without reset between rounds: what the logits hold does not change the work, and a reset costs a copy.
        forward_ms = median_ms(lambda: case.forward(run), rounds)
        total_ms = median_ms(lambda: case.both(run), rounds, lambda: setattr(case.buffer_TV, "grad", None))
    except torch.OutOfMemoryError:
        case.reset()
        torch.cuda.empty_cache()
        return row | {"error": "out of memory"}
    forward_gbs, total_gbs = logits_mb / forward_ms, 3 * logits_mb / total_ms
    return row | {
        "fwd_ms": forward_ms,
        "total_ms": total_ms,
        "fwd_gbs": forward_gbs,
        "total_gbs": total_gbs,
        "fwd_of_copy": forward_gbs / copy_gbs,
        "total_of_copy": total_gbs / copy_gbs,
        "peak_extra_bytes": peak,
        "max_err_logprob": errors[0],
        "max_err_entropy": None if name == "megatron" else errors[1],
        "max_err_grad": None if name == "megatron" else errors[2],
    }


def line(row: dict[str, object]) -> str:
    """A row for a reader."""
    head = f"{row['tokens']:>7}{row['vocab']:>8} {row['impl']:<20}"
    if "error" in row:
        return f"{head}{row['error']}"
    errors = "".join(f"{e:>9.1e}" if e is not None else f"{'-':>9}" for e in list(row.values())[-3:])
    return (
        f"{head}{row['fwd_ms']:>9.3f}{row['fwd_gbs']:>8.0f}{row['fwd_of_copy']:>8.0%}"
        f"{row['total_ms']:>10.3f}{row['total_gbs']:>8.0f}{row['total_of_copy']:>8.0%}"
        f"{row['peak_extra_bytes'] / 1e6:>10.1f}{errors}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison and prints the table."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--columns", type=int, nargs="+", default=[151936, 37984, 18992])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="writes ceilings and rows there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; tools/bench/cpu.py does not")
    ops.set_backend("native")
    measured = ceilings(options.rounds)
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: " + ", ".join(f"{name} {gbs:.0f} GB/s" for name, gbs in measured.items()))
    print(f"{'tokens':>7}{'columns':>8} {'impl':<20}{'fwd ms':>9}{'GB/s':>8}{'of copy':>8}", end="")
    print(f"{'fwd+bwd ms':>10}{'GB/s':>8}{'of copy':>8}{'peak MB':>10}{'err logp':>9}{'err H':>9}{'err grad':>9}")
    rows = []
    for tokens in options.tokens:
        for columns in options.columns:
            case = Case(tokens, columns, DTYPES[options.dtype])
            for name, run in implementations().items():
                if time.monotonic() - started > BUDGET_S:
                    print("time budget spent; the rest is left out", file=sys.stderr)
                    break
                rows.append(measure(name, run, case, options.rounds, measured["copy"]))
                print(line(rows[-1]), flush=True)
                torch.cuda.empty_cache()
            del case
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"ceilings_gbs": measured, "rows": rows}, indent=1) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
