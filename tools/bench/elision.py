"""Times policy updates with and without the responses of zero advantage, in one run on this machine.

    python tools/bench/elision.py [--prompts 48] [--tokens 128] [--json FILE]

The quickstart's model (3.2M parameters) on one process; groups of five with one right answer, so that under QAE exactly
80% of the responses have advantage 0; a quarter of the tokens are prompts. Full and elided updates take turns; a row
gives the minimum over repetitions of the wall-clock time and of the process's CPU time, which other work on the machine
disturbs less.

Every case is timed with a prompt computed for each response and, as is the default, once for all of its responses.
Sharing makes the full update cheaper by more than the elided one, which holds few responses of a prompt: with share z
of zeros and share p of prompts, groups of G, all of a pass's tokens are in proportion (1 - z) (1 - p) + p / G to
(1 - p) + p / G. That is 0.25 here, before anything is probed, and 0.20 without sharing.

``steps`` are the optimizer steps alone, without the passes that only compute log-probs: with several updates the old
log-probs of the later ones are computed before the first. Clip-Cov's means need those of all responses, so that a
forward pass of every token stays. With forward 1 and backward 2, share z of zeros and everything exact, passes and
steps together cost no less than (1 + 3 (1 - z)) / (1 + 3) of the full: 0.40 at z = 0.8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rlvr.advantage import compute_advantages
from megatron_rlvr.config.schema import (
    AdvantageConfig,
    ClipCovConfig,
    DType,
    KlCovConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScratchModelConfig,
)
from megatron_rlvr.metrics import values
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import LogprobPass, Policy
from megatron_rlvr.rollout.ports import free_port
from megatron_rlvr.trainer.scratch import make_model
from megatron_rlvr.trainer.update.batch import DealOptions, deal, pack_share
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.types import FinishReason, MicroBatch, Prompt, Rollout, RolloutGroup
from megatron_rlvr.weights.hf_config import ModelShape

GROUP_SIZE = 5
NUM_RIGHT = 1
REPETITIONS = 2
MICRO_BATCH_TOKENS = 2048
COLUMNS = {
    "case": "<41",
    "zero_fraction": ">13.1%",
    "full_s": ">7.2f",
    "elided_s": ">9.2f",
    "ratio": ">6.3f",
    "steps_ratio": ">12.3f",
    "cpu_ratio": ">10.3f",
    "steps_cpu_ratio": ">16.3f",
}
"""Fields that are printed, and how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison."""

    name: str
    loss: LossConfig
    updates: int = 1
    probed_share: float = 0.1


CASES = (
    Case(name="ppo", loss=LossConfig()),
    Case(name="ppo, none probed", loss=LossConfig(), probed_share=0.0),
    Case(name="ppo, 4 updates", loss=LossConfig(), updates=4),
    Case(name="clip_cov, 4 updates", loss=LossConfig(name="clip_cov"), updates=4, probed_share=1.0),
    Case(
        name="clip_cov, 4 updates, engine's log-probs",
        loss=LossConfig(name="clip_cov", clip_cov=ClipCovConfig(ratio="2e-3")),
        updates=4,
    ),
    Case(
        name="kl_cov, 4 updates, engine's log-probs",
        loss=LossConfig(name="kl_cov", kl_cov=KlCovConfig(skip_zero_advantage=True)),
        updates=4,
    ),
)


class TimedPolicy(Policy):
    """A policy that knows how long its passes without gradient took."""

    pass_s = 0.0
    pass_cpu_s = 0.0

    def logprobs(self, micro_batches: Sequence[MicroBatch], *, temperature: float) -> LogprobPass:
        """As `Policy.logprobs`, its time added to `pass_s` and `pass_cpu_s`."""
        start, start_cpu = time.perf_counter(), time.process_time()
        found = super().logprobs(micro_batches, temperature=temperature)
        self.pass_s += time.perf_counter() - start
        self.pass_cpu_s += time.process_time() - start_cpu
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """What one rollout batch took: everything, and the optimizer steps alone."""

    wall: float
    cpu: float
    steps_wall: float
    steps_cpu: float


def make_groups(num_prompts: int, num_tokens: int, vocab_size: int) -> list[RolloutGroup]:
    """Random tokens, a quarter of them the prompt's."""
    rng = np.random.default_rng(0)
    prompt_tokens = num_tokens // 4
    groups = []
    for index in range(num_prompts):
        rollouts = []
        for number in range(GROUP_SIZE):
            size = num_tokens - prompt_tokens
            right = float(number < NUM_RIGHT)
            rollouts.append(
                Rollout(
                    response_ids=rng.integers(0, vocab_size, size).astype(np.int32),
                    rollout_logprobs=np.full(size, -5.0, np.float32),
                    text="",
                    finish_reason=FinishReason.length,
                    weight_versions=[(0, 0, size)],
                    correctness=right,
                    reward=right,
                )
            )
        ids = rng.integers(0, vocab_size, prompt_tokens).astype(np.int32)
        prompt = Prompt(uid=f"made/{index}", text="", input_ids=ids, answer="", data_source="made")
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts, index=index))
    return groups


def time_case(
    case: Case, policy: TimedPolicy, parallel: ParallelContext, groups: list[RolloutGroup], *, share_prompts: bool
) -> dict[str, object]:
    """Seconds of all updates on one rollout batch, full and elided by turns."""
    optim = OptimConfig(lr=1e-6)
    updater = Updater(policy, parallel, loss=case.loss, optim=optim, temperature=1.0, seed=0, total_updates=1000)
    advantages, metrics = compute_advantages(groups, AdvantageConfig())
    times: dict[bool, list[Seconds]] = {False: [], True: []}
    for elide in [False, True] * (REPETITIONS + 1):
        options = DealOptions(
            updates_per_rollout=case.updates,
            aggregation="token-mean",
            max_response_tokens=1024,
            max_tokens_per_microbatch=MICRO_BATCH_TOKENS,
            dp_size=1,
            micro_batch_multiple=1,
            elide_zero_advantage=elide,
            probed_share=case.probed_share,
            share_prompts=share_prompts,
        )
        [shares] = deal(groups, advantages, options)
        updates = [pack_share(share, pad_to_multiple=1, device=policy.device) for share in shares]
        policy.pass_s = policy.pass_cpu_s = 0.0
        start, start_cpu = time.perf_counter(), time.process_time()
        updater.run(updates)
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        times[elide].append(
            Seconds(wall=wall, cpu=cpu, steps_wall=wall - policy.pass_s, steps_cpu=cpu - policy.pass_cpu_s)
        )
    row: dict[str, object] = {
        "case": case.name,
        "updates": case.updates,
        "zero_fraction": values(metrics)["advantage/zero_fraction"],
        "probed_share": case.probed_share,
        "prompts_shared": share_prompts,
        "tokens": sum(len(r.response_ids) + len(g.prompt.input_ids) for g in groups for r in g.rollouts),
    }
    for field, prefix in (("wall", ""), ("cpu", "cpu_"), ("steps_wall", "steps_"), ("steps_cpu", "steps_cpu_")):
        # The first of each warms up.
        full, elided = (min(getattr(seconds, field) for seconds in times[elide][1:]) for elide in (False, True))
        row |= {f"{prefix}full_s": round(full, 3), f"{prefix}elided_s": round(elided, 3)}
        row[f"{prefix}ratio"] = round(elided / full, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="groups of five responses")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt and a response together")
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
        policy = TimedPolicy(path, shape, model_config=model, parallel=parallel, optim=OptimConfig())
        groups = make_groups(arguments.prompts, arguments.tokens, shape.vocab_size)
        rows = []
        print("prompts", *[f"{name:{width.partition('.')[0]}}" for name, width in COLUMNS.items()])
        for case, share_prompts in itertools.product(CASES, (False, True)):
            row = time_case(case, policy, parallel, groups, share_prompts=share_prompts)
            rows.append(row)
            prompts = "shared" if share_prompts else "alone"
            print(f"{prompts:7}", *[f"{row[name]:{form}}" for name, form in COLUMNS.items()], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
