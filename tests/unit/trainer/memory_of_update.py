"""Measures what a trainer rank takes: ``python memory_of_update.py SMALL_MODEL MODEL '[{"recompute": "full"}, ...]'``.

Prints a JSON object for every case: bytes of resident memory, above those before the policy was built, that a real
`Policy` holds between updates and at the peak of an update. Run it with MALLOC_MMAP_THRESHOLD_=65536, so that freed
tensors leave the resident memory at once.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig, Recompute
from megatron_rlvr.data.packing import PackedSequence, build_microbatch
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.types import MicroBatch
from megatron_rlvr.weights.hf_config import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measurement."""

    dtype: str = "float32"
    recompute: str = "none"
    num_sequences: int = 8
    sequence: int = 128
    """Tokens of a sequence, all but one of them response."""
    logits_mb: int | None = None


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/self/status")


def forget_peak() -> None:
    """Sets VmHWM to VmRSS (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def micro_batch(case: Case, vocab_size: int) -> MicroBatch:
    random = np.random.default_rng(0)
    tokens = random.integers(vocab_size, size=(case.num_sequences, case.sequence), dtype=np.int32)
    sequences = [
        PackedSequence(
            prompt_ids=row[:1],
            response_ids=row[1:],
            advantage=1.0,
            weight=1.0 / tokens.size,
            rollout_logprobs=np.zeros(case.sequence - 1, np.float32),
            trajectory=index,
        )
        for index, row in enumerate(tokens)
    ]
    return build_microbatch(sequences, pad_to_multiple=1)


def update_thrice(folder: Path, case: Case, parallel: ParallelContext) -> dict[str, int]:
    """Bytes that a policy holds between updates and at the peak of one; the first makes the optimizer's moments."""
    shape = ModelShape.from_hf(folder)
    micro = micro_batch(case, shape.vocab_size)

    def loss(logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict]:
        return -(logprobs_T.double() * micro.weights_T.double()).sum(), {}

    gc.collect()  # the policy before, whose hooks refer to it
    before = resident("VmRSS")
    policy = Policy(
        folder,
        shape,
        model_config=ModelConfig(
            dtype=DType(case.dtype), recompute=Recompute(case.recompute), logits_mb=case.logits_mb
        ),
        parallel=parallel,
        optim=OptimConfig(lr=1e-4),
    )
    for _ in range(2):
        policy.update([micro], loss, lr=1e-4, temperature=1.0)
    held = resident("VmRSS")
    forget_peak()
    policy.update([micro], loss, lr=1e-4, temperature=1.0)
    return {"held": held - before, "peak": resident("VmHWM") - before}


def main(small: Path, folder: Path, cases: list[Case]) -> None:
    """A small model first: it brings in what libraries load at their first use."""
    with ParallelContext(ParallelConfig(), seed=0) as parallel:
        for case in cases:
            update_thrice(small, replace(case, num_sequences=1, sequence=8), parallel)
        for case in cases:
            print(json.dumps(update_thrice(folder, case, parallel)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Case(**fields) for fields in json.loads(sys.argv[3])])
