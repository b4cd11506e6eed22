"""Log-prob and entropy of vocabulary logits on the CPU: ours beside what other trainers and torch.compile do.

    python tools/bench/cpu.py [--tokens 512] [--vocab 151936] [--dtype bf16] [--rounds 5] [--impl NAME ...]
                            [--json FILE]

All implementations see the same logits and upstream gradients in one process; times are the least of the rounds.
`floor` is what no implementation with this memory traffic beats: copying the logits once (backward reads and writes
them) plus half a copy (forward reads them). `peak_extra_bytes` is the most memory in use at once beyond the logits.
Errors are against float64 on the same (rounded) logits, over a few rows; the gradient's includes the rounding to the
logits' dtype. `native` runs as in the trainer, with its gradient written over the logits; `native_new_gradient`
writes a new tensor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import PEERS, LogprobEntropy

from megatron_rlvr import _C, ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_ROWS = 8


def native(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, as the trainer calls it."""
    return ops.vocab_parallel_logprob_entropy(logits_TV, targets_T, inplace_backward=True)


def native_new_gradient(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, leaving the logits as they are."""
    return ops.vocab_parallel_logprob_entropy(logits_TV, targets_T)


def implementations() -> dict[str, LogprobEntropy]:
    """By the name in the table."""
    return {"native": native, "native_new_gradient": native_new_gradient, **PEERS}


def least_ms(run: Callable[[], None], rounds: int) -> float:
    """The least wall-clock time of ``rounds`` calls, in ms."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def peak_bytes(run: Callable[[], None]) -> int:
    """The most memory that torch's CPU allocator had given out at once during ``run``, beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


class Case:
    """One set of logits, targets and upstream gradients, with the float64 answers for its first rows."""

    def __init__(self, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.source_TV = torch.empty(tokens, vocab, dtype=dtype).normal_(std=2.0, generator=generator)
        self.targets_T = torch.randint(vocab, (tokens,), generator=generator)
        self.g_logprob_T = torch.randn(tokens, generator=generator)
        self.g_entropy_T = torch.randn(tokens, generator=generator)
        self.buffer_TV = self.source_TV.clone().requires_grad_()
        rows = min(CHECKED_ROWS, tokens)
        self.rows = rows
        exact = self.source_TV[:rows].double().requires_grad_()
        log_p = exact.log_softmax(dim=1)
        self.logprobs = log_p.gather(1, self.targets_T[:rows, None])[:, 0]
        self.entropy = -(log_p.exp() * log_p).sum(dim=1)
        upstream = [self.g_logprob_T[:rows].double(), self.g_entropy_T[:rows].double()]
        torch.autograd.backward([self.logprobs, self.entropy], upstream)
        self.logprobs, self.entropy, self.gradient = self.logprobs.detach(), self.entropy.detach(), exact.grad

    def forward(self, run: LogprobEntropy) -> tuple[torch.Tensor, torch.Tensor]:
        # A view, since logits are never a leaf in training and only then may be written over.
        return run(self.buffer_TV.view_as(self.buffer_TV), self.targets_T)

    def backward(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.autograd.backward(list(outputs), [self.g_logprob_T, self.g_entropy_T])

    def reset(self) -> None:
        """The logits as they were, untouched by a gradient written over them."""
        self.buffer_TV.grad = None
        with torch.no_grad():
            self.buffer_TV.copy_(self.source_TV)

    def errors(self, run: LogprobEntropy) -> tuple[float, float, float]:
        """Largest absolute errors of log-prob, entropy and gradient."""
        self.reset()
        outputs = self.forward(run)
        self.backward(outputs)
        assert self.buffer_TV.grad is not None
        pairs = [
            (outputs[0].detach()[: self.rows], self.logprobs),
            (outputs[1].detach()[: self.rows], self.entropy),
            (self.buffer_TV.grad[: self.rows], self.gradient),
        ]
        logprob, entropy, gradient = (float((got.double() - want).abs().max()) for got, want in pairs)
        return logprob, entropy, gradient


def measure(name: str, run: LogprobEntropy, case: Case, rounds: int, floor_ms: float) -> dict[str, object]:
    """One row of the table."""
    errors = case.errors(run)  # also the warm-up, compilation included
    forward_ms, backward_ms = [], []
    for _ in range(rounds):
        case.reset()
        start = time.perf_counter()
        outputs = case.forward(run)
        middle = time.perf_counter()
        case.backward(outputs)
        end = time.perf_counter()
        del outputs
        forward_ms.append((middle - start) * 1e3)
        backward_ms.append((end - middle) * 1e3)
    case.reset()
    peak = peak_bytes(lambda: case.backward(case.forward(run)))
    tokens, vocab = case.source_TV.shape
    return {
        "op": "vocab_parallel_logprob_entropy",
        "impl": name,
        "tokens": tokens,
        "vocab": vocab,
        "dtype": str(case.source_TV.dtype).removeprefix("torch."),
        "fwd_ms": min(forward_ms),
        "bwd_ms": min(backward_ms),
        "total_ms": min(f + b for f, b in zip(forward_ms, backward_ms, strict=True)),
        "floor_ms": floor_ms,
        "peak_extra_bytes": peak,
        "max_err_logprob": errors[0],
        "max_err_entropy": errors[1],
        "max_err_grad": errors[2],
    }


def table(rows: list[dict[str, object]]) -> str:
    """The rows for a reader, with ratios to the floor and to `native`."""
    head = f"{'impl':<20}{'fwd ms':>9}{'bwd ms':>9}{'total':>9}{'x floor':>9}{'x native':>10}{'extra MB':>10}"
    lines = [head + f"{'err logp':>10}{'err H':>10}{'err grad':>10}"]
    native_ms = next((row["total_ms"] for row in rows if row["impl"] == "native"), float("nan"))
    for row in rows:
        lines.append(
            f"{row['impl']:<20}{row['fwd_ms']:>9.1f}{row['bwd_ms']:>9.1f}{row['total_ms']:>9.1f}"
            f"{row['total_ms'] / row['floor_ms']:>9.1f}{row['total_ms'] / native_ms:>10.1f}"
            f"{row['peak_extra_bytes'] / 1e6:>10.1f}"
            f"{row['max_err_logprob']:>10.1e}{row['max_err_entropy']:>10.1e}{row['max_err_grad']:>10.1e}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--impl", nargs="*", choices=sorted(implementations()), help="only these; default: all")
    parser.add_argument("--json", type=Path, help="writes the rows there")
    options = parser.parse_args(arguments)
    if min(options.tokens, options.vocab, options.rounds) < 1:
        parser.error("--tokens, --vocab and --rounds must be 1 or above")
    ops.set_backend("native")
    case = Case(options.tokens, options.vocab, DTYPES[options.dtype])
    with torch.no_grad():
        copy_ms = least_ms(lambda: case.buffer_TV.copy_(case.source_TV), max(options.rounds, 5))
    floor_ms = 1.5 * copy_ms
    print(
        f"{options.tokens} tokens x {options.vocab} columns, {options.dtype}, {torch.get_num_threads()} threads, "
        f"{_C.cpu_kernels()} kernels; copy {copy_ms:.1f} ms, floor {floor_ms:.1f} ms",
        flush=True,
    )
    rows = []
    for name, run in implementations().items():
        if options.impl and name not in options.impl:
            continue
        print(f"  {name} ...", file=sys.stderr, flush=True)
        rows.append(measure(name, run, case, options.rounds, floor_ms))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
