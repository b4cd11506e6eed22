"""Supervised warm start: next-token training on answers to the task's own training problems, cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_rlvr.config.schema import OptimConfig, RunConfig
from megatron_rlvr.data.packing import PackedSequence, build_microbatch, plan_microbatches
from megatron_rlvr.data.problems import Problem
from megatron_rlvr.data.prompts import PromptBuilder, PromptStream
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy.optimizer import learning_rate
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.trainer.update.batch import on_device
from megatron_rlvr.types import MicroBatch


def prompt_builder(config: RunConfig, tokenizer: Tokenizer) -> PromptBuilder:
    """The same prompts as the rollouts'."""
    data = config.data
    return PromptBuilder(
        tokenizer,
        system_prompt=data.system_prompt,
        prompt_template=data.prompt_template,
        chat_template=data.chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
    )


class WarmStart:
    """Trains a policy on (prompt, answer) pairs; collective over the trainer's ranks.

    Args:
        problems: the training split; every rank draws the same batches from it.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, parallel: ParallelContext, problems: Sequence[Problem]
    ) -> None:
        self.config = config.warm_start
        self.policy = policy
        self.parallel = parallel
        self.max_tokens = config.train.max_tokens_per_microbatch
        self.tokenizer = Tokenizer.load(policy.path)
        self.stream = PromptStream(problems, prompt_builder(config, self.tokenizer), seed=config.train.seed)
        self.optim = OptimConfig(lr=self.config.lr, weight_decay=0.0, warmup_steps=20, beta2=0.98)
        policy.reset_optimizer(self.optim)

    def run(self, evaluate: Callable[[int], float], on_progress: Callable[[int], None]) -> tuple[int, float]:
        """Trains until held-out accuracy reaches the target or `max_steps` are done.

        Args:
            evaluate: (steps done) -> greedy accuracy on held-out problems, the same on every rank.
            on_progress: called with the number of new steps.

        Returns:
            Steps done and the last accuracy.
        """
        accuracy = 0.0
        step = 0
        while step < self.config.max_steps:
            self._train_step(step)
            step += 1
            on_progress(1)
            if step % self.config.check_every == 0:
                accuracy = evaluate(step)
                if accuracy >= self.config.target_accuracy:
                    break
        return step, accuracy

    def _train_step(self, step: int) -> None:
        sequences = list(self._sequences())
        ranks = self.parallel.ranks
        plan = plan_microbatches(
            [sequence.num_tokens for sequence in sequences],
            dp_size=ranks.dp_size,
            max_tokens=self.max_tokens,
            multiple_of=ranks.pp_size if self.parallel.config.vpp > 1 else 1,
        )
        pad = ranks.tp_size if self.parallel.config.sequence_parallel else 1
        micro_batches = [
            on_device(build_microbatch([sequences[i] for i in micro], pad_to_multiple=pad), self.policy.device)
            for micro in plan[ranks.dp_rank]
        ]
        lr = learning_rate(self.optim, step, self.config.max_steps)
        self.policy.update(micro_batches, _cross_entropy, lr=lr, temperature=1.0)

    def _sequences(self) -> Iterator[PackedSequence]:
        """A batch of prompts with their answers, each token weighted by one over all answer tokens."""
        pairs = []
        for _, prompt in self.stream.next(self.config.batch_size):
            answer = self.tokenizer.encode(str(prompt.answer), add_special_tokens=False)
            pairs.append((prompt.input_ids, np.append(answer, self.tokenizer.eos_id).astype(np.int32)))
        num_tokens = sum(len(answer) for _, answer in pairs)
        for index, (prompt_ids, answer) in enumerate(pairs):
            yield PackedSequence(
                prompt_ids=prompt_ids,
                response_ids=answer,
                advantage=1.0,
                weight=1.0 / num_tokens,
                rollout_logprobs=np.zeros(len(answer), np.float32),
                trajectory=index,
            )


def _cross_entropy(
    logprobs_T: torch.Tensor, entropy_T: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, Metric]]:
    return -(logprobs_T.double() * micro.weights_T.double()).sum(), {}
