"""Answers to a fixed set of problems: the held-out split of a run, or a set of its own such as a benchmark."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_rlvr.config.schema import EvalSetConfig, RewardConfig
from megatron_rlvr.data.eval_sets import load_set
from megatron_rlvr.data.prompts import PromptBuilder
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.messages import Sampling
from megatron_rlvr.rollout.respond import OnProgress, Reporter, Responder, Tally, gather_all, response_metrics
from megatron_rlvr.types import EvalBatch, Prompt, RolloutGroup

OnGroup = Callable[[RolloutGroup], None]
HELD_OUT = "held_out"
"""Name of a run's validation split as a set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetDefaults:
    """What a set that says nothing of its own takes: the run's settings."""

    system_prompt: str | None
    prompt_template: str | None
    chat_template: bool
    max_prompt_tokens: int
    max_response_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """Problems and how they are answered. A set with greedy answers beside sampled ones is two of these."""

    name: str
    prompts: tuple[Prompt, ...]
    """In the order in which they are asked; uids are unique over all sets."""
    sampling: Sampling
    num_samples: int
    """Responses a problem."""

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0.0

    @property
    def key(self) -> str:
        """Unique over the sets of a run: ``<name>``, or ``<name>/greedy`` for greedy answers."""
        return f"{self.name}/greedy" if self.greedy else self.name

    def first(self, num_problems: int | None) -> EvalSet:
        """The first so many problems; all of them for None."""
        return replace(self, prompts=self.prompts[:num_problems])

    def without(self, uids: frozenset[str]) -> EvalSet:
        """The problems that are not among `uids`."""
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt.uid not in uids))


def build_sets(
    specs: Sequence[EvalSetConfig], defaults: SetDefaults, *, tokenizer: Tokenizer, reward: RewardConfig
) -> list[EvalSet]:
    """The sets with their prompts: one of sampled answers and one of greedy answers for each that asks for both.

    Raises:
        ValueError: problems that cannot be loaded, or a prompt that is too long: a benchmark without some of its
            problems is another one.
    """
    return [part for spec in specs for part in _build(spec, defaults, tokenizer, reward)]


def _build(spec: EvalSetConfig, defaults: SetDefaults, tokenizer: Tokenizer, reward: RewardConfig) -> list[EvalSet]:
    builder = PromptBuilder(
        tokenizer,
        system_prompt=defaults.system_prompt if spec.system_prompt is None else spec.system_prompt,
        prompt_template=defaults.prompt_template if spec.prompt_template is None else spec.prompt_template,
        chat_template=defaults.chat_template if spec.chat_template is None else spec.chat_template,
        max_prompt_tokens=defaults.max_prompt_tokens,
    )
    prompts, num_too_long = builder.build_all(load_set(spec, reward))
    if num_too_long:
        raise ValueError(
            f"data.max_prompt_tokens must hold every prompt of evaluation set {spec.name!r}, got "
            f"{defaults.max_prompt_tokens}, which {num_too_long} of them exceed"
        )
    max_tokens = defaults.max_response_tokens if spec.max_response_tokens is None else spec.max_response_tokens
    sampled = Sampling(
        temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k, max_tokens=max_tokens, stop=defaults.stop
    )
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, stop=defaults.stop)
    parts = []
    if spec.num_samples:
        parts.append(EvalSet(name=spec.name, prompts=tuple(prompts), sampling=sampled, num_samples=spec.num_samples))
    if spec.greedy:
        parts.append(EvalSet(name=spec.name, prompts=tuple(prompts), sampling=greedy, num_samples=1))
    return parts


async def evaluate_set(
    eval_set: EvalSet,
    *,
    client: GenerationClient,
    responder: Responder,
    on_progress: OnProgress,
    on_group: OnGroup | None = None,
) -> EvalBatch:
    """Answers every problem of the set.

    Args:
        client: where responses come from.
        responder: samples and scores.
        on_progress: how far it is, a few times a second.
        on_group: called with every problem's answers as soon as all of them have their verdict.

    Returns:
        One group a problem, in the order of the set.

    Raises:
        RolloutError: a response could not be had.
    """
    # Ids are new in every call, so that an evaluation that is repeated never meets its own leftovers.
    run = uuid.uuid4().hex[:8]
    tally = Tally()
    report = Reporter(on_progress, wanted=len(eval_set.prompts), tally=tally, selector=None)

    async def answer(index: int, prompt: Prompt) -> RolloutGroup:
        name = f"{run}-v{index}"
        group = await responder.group(
            client, prompt, index, eval_set.sampling, eval_set.num_samples, name, tally, report
        )
        if on_group is not None:
            on_group(group)
        return group

    groups = await gather_all(answer(index, prompt) for index, prompt in enumerate(eval_set.prompts))
    report(final=True)
    return EvalBatch(groups=groups, metrics=tally.metrics() | response_metrics(groups))
