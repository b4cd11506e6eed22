"""Times policy updates whose groups compute their prompt once, against once for every response, in one run.

    python tools/bench/shared_prompts.py [--json FILE]

The quickstart's model (3.2M parameters) on one process; groups of eight responses, all of them trained on. Both kinds
of update take turns; a row gives the minimum over repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_rlvr.config.schema import DType, LossConfig, ModelConfig, OptimConfig, ParallelConfig, ScratchModelConfig
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.rollout.ports import free_port
from megatron_rlvr.trainer.scratch import make_model
from megatron_rlvr.trainer.update.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup
from megatron_rlvr.weights.hf_config import ModelShape

GROUP_SIZE = 8
REPETITIONS = 5
CASES = ((16, 16, 24), (16, 64, 24), (4, 128, 128), (4, 32, 256))
"""Groups, tokens of a prompt, tokens of a response."""


def make_groups(num_groups: int, prompt: int, response: int, vocab_size: int) -> list[RolloutGroup]:
    """Random tokens."""
    rng = np.random.default_rng(0)

    def rollout() -> Rollout:
        return Rollout(
            response_ids=rng.integers(0, vocab_size, response).astype(np.int32),
            rollout_logprobs=np.full(response, -5.0, np.float32),
            text="",
            finish_reason=FinishReason.length,
            weight_versions=[(0, 0, response)],
        )

    def asked(index: int) -> Prompt:
        ids = rng.integers(0, vocab_size, prompt).astype(np.int32)
        return Prompt(uid=f"made/{index}", text="", input_ids=ids, answer="", data_source="made")

    return [
        RolloutGroup(prompt=asked(index), rollouts=[rollout() for _ in range(GROUP_SIZE)], index=index)
        for index in range(num_groups)
    ]


def time_case(
    case: tuple[int, int, int], policy: Policy, parallel: ParallelContext, vocab_size: int
) -> dict[str, object]:
    """Seconds of an update with and without shared prompts, and the tokens that each of them packs."""
    groups = make_groups(*case, vocab_size)
    advantages = [np.linspace(-1.0, 1.0, GROUP_SIZE) for _ in groups]
    updater = Updater(
        policy, parallel, loss=LossConfig(), optim=OptimConfig(lr=1e-6), temperature=1.0, seed=0, total_updates=1000
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tokens: dict[bool, int] = {}
    for share in [False, True] * (REPETITIONS + 1):
        options = DealOptions(
            updates_per_rollout=1,
            aggregation="token-mean",
            max_response_tokens=case[2],
            max_tokens_per_microbatch=8192,
            dp_size=1,
            micro_batch_multiple=1,
            elide_zero_advantage=False,
            share_prompts=share,
        )
        [[dealt]] = deal(groups, advantages, options)
        update = pack_share(dealt, pad_to_multiple=1, device=policy.device)
        tokens[share] = sum(micro.num_tokens for micro in update.micro_batches)
        start = time.perf_counter()
        updater.run([update])
        seconds[share].append(time.perf_counter() - start)
    alone, shared = (min(seconds[share][1:]) for share in (False, True))  # the first of each warms up
    return {
        **{"groups": case[0], "group_size": GROUP_SIZE, "prompt_tokens": case[1], "response_tokens": case[2]},
        **{"packed_alone": tokens[False], "packed_shared": tokens[True]},
        **{"alone_s": round(alone, 3), "shared_s": round(shared, 3), "ratio": round(shared / alone, 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    with (
        tempfile.TemporaryDirectory() as folder,
        ParallelContext(ParallelConfig(), seed=0, timeout_s=600) as parallel,
    ):
        path = Path(folder) / "model"
        make_model(path, ScratchModelConfig(), texts=["1 + 2 = 3", "some words"] * 50, seed=0)
        shape = ModelShape.from_hf(path)
        model = ModelConfig(path=str(path), dtype=DType.fp32)
        policy = Policy(path, shape, model_config=model, parallel=parallel, optim=OptimConfig())
        rows = []
        print(f"{'prompt':>7} {'response':>9} {'tokens':>8} {'shared':>8} {'alone':>8} {'shared':>8} {'ratio':>6}")
        for case in CASES:
            row = time_case(case, policy, parallel, shape.vocab_size)
            rows.append(row)
            print(
                f"{case[1]:7} {case[2]:9} {row['packed_alone']:8} {row['packed_shared']:8} {row['alone_s']:6.3f} s "
                f"{row['shared_s']:6.3f} s {row['ratio']:6.3f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
