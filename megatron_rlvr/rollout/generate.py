"""One step's rollouts: draw prompts, sample G responses each, score every response as it ends, select groups."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_rlvr.config.schema import EvalConfig, GroupFilter, OverlongConfig, RolloutConfig
from megatron_rlvr.reward.overlong import overlong_penalty
from megatron_rlvr.rollout.answer import Sample
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.messages import Progress, RolloutError, Sampling
from megatron_rlvr.rollout.selection import GroupSelector, Selection
from megatron_rlvr.types import (
    EvalBatch,
    FinishReason,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    Score,
    VerifierStatus,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[Progress], None]
PROGRESS_EVERY_S = 0.2


class PromptSource(Protocol):
    """An endless stream of training prompts, numbered, in an order fixed by its seed."""

    num_too_long: int
    """Problems left out since the start."""
    num_broken: int

    def next(self, num_prompts: int) -> list[tuple[int, Prompt]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Verifier(Protocol):
    """Scores responses; never raises for what a response contains."""

    async def score(self, prompt: Prompt, response_text: str) -> Score: ...


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What one step or evaluation has generated so far."""

    started: float = field(default_factory=time.monotonic)
    last_response: float = field(default_factory=time.monotonic)
    num_responses: int = 0
    response_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retries: int = 0
    abort_retries: int = 0
    aborted: int = 0
    verifier: Counter[VerifierStatus] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        self.last_response = time.monotonic()
        self.num_responses += 1
        self.response_tokens += len(sample.output_ids)
        self.prompt_tokens += sample.prompt_tokens
        self.cached_tokens += sample.cached_tokens
        self.retries += sample.retries
        self.abort_retries += sample.aborts
        self.aborted += sample.finish_reason is FinishReason.abort

    def metrics(self) -> dict[str, float]:
        """``time/generate_s`` ends with the last response, ``time/reward_s`` is what verdicts took beyond it."""
        generate_s = self.last_response - self.started
        return {
            "rollout/responses": self.num_responses,
            "rollout/aborted": self.aborted,
            "rollout/retries": self.retries,
            "rollout/abort_retries": self.abort_retries,
            "rollout/prompt_tokens": self.prompt_tokens,
            "rollout/cached_tokens": self.cached_tokens,
            "rollout/response_tokens": self.response_tokens,
            "rollout/tokens_per_s": self.response_tokens / generate_s if generate_s > 0 else 0.0,
            "verifier/unparsable": self.verifier[VerifierStatus.unparsable],
            "verifier/timeout": self.verifier[VerifierStatus.timeout],
            "verifier/crash": self.verifier[VerifierStatus.crash],
            "time/generate_s": generate_s,
            "time/reward_s": time.monotonic() - self.last_response,
        }


class RolloutGenerator:
    """Generates rollout batches and evaluations; holds the data order and the surplus of dynamic sampling.

    Args:
        verifier: where verdicts come from.
        stream: training prompts.
        validation: held-out prompts.
        rollout: batch size, sampling and filter.
        evaluation: sampling of evaluations.
        overlong: the penalty on long responses.
        seed: of the sampling seeds sent to the servers.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        stream: PromptSource,
        validation: Sequence[Prompt],
        rollout: RolloutConfig,
        evaluation: EvalConfig,
        overlong: OverlongConfig,
        seed: int,
    ) -> None:
        self.client: GenerationClient | None = None
        """Where responses come from; set before the first batch."""
        self._verifier, self._stream, self._validation = verifier, stream, validation
        self._rollout, self._evaluation, self._overlong, self._seed = rollout, evaluation, overlong, seed
        self._surplus: list[RolloutGroup] = []
        self._acceptance = 1.0

    def state_dict(self) -> dict[str, Any]:
        """Data order, surplus groups and expected acceptance; pickles."""
        return {
            "stream": self._stream.state_dict(),
            "surplus": list(self._surplus),
            "acceptance": self._acceptance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._surplus = list(state["surplus"])
        self._acceptance = state["acceptance"]

    async def generate(self, *, step: int, policy_version: int, on_progress: OnProgress) -> RolloutBatch:
        """The groups of one step: exactly ``prompts_per_step``, in the order of the data.

        With the filter ``mixed``, groups that are all right or all wrong are replaced by further prompts, at most
        ``max_gen_batches * prompts_per_step`` of them; then rejected groups fill the batch, with a warning and a count
        in ``rollout/groups_topped_up``. Accepted groups beyond the batch come first in the next one.

        Raises:
            RolloutError: a response could not be had. The data order is then as it was before.
        """
        before = self.state_dict()
        try:
            return await self._generate(step, policy_version, on_progress)
        except BaseException:
            self.load_state_dict(before)
            raise

    async def _generate(self, step: int, policy_version: int, on_progress: OnProgress) -> RolloutBatch:
        config = self._rollout
        filtered = config.group_filter is GroupFilter.mixed
        tally = _Tally()
        selector = GroupSelector(
            wanted=config.prompts_per_step,
            bound=config.prompts_per_step * (config.max_gen_batches if filtered else 1),
            keep=(lambda group: group.mixed) if filtered else (lambda group: True),
            carried=self._surplus,
            acceptance=self._acceptance,
        )
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_response_tokens,
            stop=tuple(config.stop),
        )
        client = self._connected(policy_version)
        # Ids are new in every call, so that a step that is repeated after a failure never meets its own leftovers.
        run = uuid.uuid4().hex[:8]
        report = _Reporter(on_progress, wanted=config.prompts_per_step, tally=tally, selector=selector)
        pending: set[asyncio.Task[RolloutGroup]] = set()
        done: set[asyncio.Task[RolloutGroup]] = set()
        try:
            while not selector.complete:
                if selector.num_to_draw:
                    prompts = self._stream.next(selector.num_to_draw)
                    selector.draw([index for index, _ in prompts])
                    for index, prompt in prompts:
                        name = f"{run}-s{step}-g{index}"
                        work = self._group(client, prompt, index, sampling, config.group_size, name, tally, report)
                        pending.add(asyncio.create_task(work))
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    selector.finish(task.result())
                report()
        finally:
            await _cancel([*pending, *done])
        report(final=True)
        selection = selector.select()
        self._surplus, self._acceptance = selection.surplus, selection.acceptance
        if selection.num_topped_up:
            logger.warning(
                "step %d: %d prompts gave %d groups with right and wrong responses, %d are wanted; "
                "%d groups without a learning signal fill the batch",
                step, selector.num_drawn, config.prompts_per_step - selection.num_topped_up,
                config.prompts_per_step, selection.num_topped_up,
            )  # fmt: skip
        metrics = _batch_metrics(selection, selector, tally)
        metrics["data/prompts_too_long"] = self._stream.num_too_long
        metrics["data/prompts_broken"] = self._stream.num_broken
        return RolloutBatch(groups=selection.groups, metrics=metrics)

    async def evaluate(
        self, *, policy_version: int, on_progress: OnProgress, max_problems: int | None = None
    ) -> EvalBatch:
        """Answers to the held-out problems (the first ``eval.max_problems`` of them), in their fixed order.

        Args:
            max_problems: a smaller number of problems, for a quick look.

        Raises:
            RolloutError: a response could not be had.
        """
        config = self._evaluation
        problems = self._validation[: config.max_problems][:max_problems]
        sampling = Sampling(
            temperature=config.temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=self._rollout.max_response_tokens,
            stop=tuple(self._rollout.stop),
        )
        client = self._connected(policy_version)
        run = uuid.uuid4().hex[:8]
        tally = _Tally()
        report = _Reporter(on_progress, wanted=len(problems), tally=tally, selector=None)
        groups = await _all(
            self._group(client, prompt, index, sampling, config.num_samples, f"{run}-v{index}", tally, report)
            for index, prompt in enumerate(problems)
        )
        report(final=True)
        return EvalBatch(groups=groups, metrics=tally.metrics() | _response_metrics(groups))

    def _connected(self, policy_version: int) -> GenerationClient:
        if self.client is None:
            raise RolloutError("the rollout process knows no servers yet: connect(urls) comes before generation")
        self.client.min_version = policy_version
        return self.client

    async def _group(
        self,
        client: GenerationClient,
        prompt: Prompt,
        index: int,
        sampling: Sampling,
        count: int,
        name: str,
        tally: _Tally,
        report: _Reporter,
    ) -> RolloutGroup:
        with client.place(count) as placement:

            async def respond(number: int) -> Rollout:
                seed = _sampling_seed(self._seed, prompt.uid, index, number) if sampling.temperature > 0 else None
                sample = await client.generate(
                    prompt.input_ids, sampling, rid=f"{name}-r{number}", placement=placement, seed=seed
                )
                tally.add(sample)
                report()
                return await self._judge(prompt, sample, tally)

            rollouts = await _all(respond(number) for number in range(count))
        report.num_groups += 1
        return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)

    async def _judge(self, prompt: Prompt, sample: Sample, tally: _Tally) -> Rollout:
        overlong = self._overlong
        rollout = Rollout(
            response_ids=sample.output_ids,
            rollout_logprobs=sample.logprobs,
            text=sample.text,
            finish_reason=sample.finish_reason,
            weight_versions=sample.weight_versions,
        )
        if overlong.enabled:
            rollout.penalty = overlong_penalty(
                len(sample.output_ids),
                max_length=overlong.max_length,
                buffer=overlong.buffer,
                factor=overlong.factor,
            )
        if rollout.valid:
            score = await self._verifier.score(prompt, sample.text)
            tally.verifier[score.status] += 1
            rollout.correctness, rollout.reward, rollout.verifier_status = score.correctness, score.reward, score.status
        return rollout


class _Reporter:
    """Passes progress on, a few times a second."""

    def __init__(self, on_progress: OnProgress, *, wanted: int, tally: _Tally, selector: GroupSelector | None) -> None:
        self.num_groups = 0
        self._on_progress, self._wanted, self._tally, self._selector = on_progress, wanted, tally, selector
        self._next = 0.0

    def __call__(self, *, final: bool = False) -> None:
        now = time.monotonic()
        if now < self._next and not final:
            return
        self._next = now + PROGRESS_EVERY_S
        selector = self._selector
        self._on_progress(
            Progress(
                finished=self.num_groups,
                drawn=self._wanted if selector is None else selector.num_drawn,
                accepted=self.num_groups if selector is None else selector.num_accepted,
                wanted=self._wanted,
                response_tokens=self._tally.response_tokens,
            )
        )


def _batch_metrics(selection: Selection, selector: GroupSelector, tally: _Tally) -> dict[str, float]:
    return {
        "rollout/groups_generated": selector.num_drawn,
        "rollout/groups_accepted": selection.num_accepted,
        "rollout/groups_carried": selection.num_carried,
        "rollout/groups_surplus": len(selection.surplus),
        "rollout/groups_topped_up": selection.num_topped_up,
        **tally.metrics(),
        **_response_metrics(selection.groups),
    }


def _response_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Lengths (in tokens) and ends of the valid responses of these groups."""
    valid = [rollout for group in groups for rollout in group.rollouts if rollout.valid]
    if not valid:
        return {}
    lengths = np.array([len(rollout.response_ids) for rollout in valid])
    stopped = float(np.mean([rollout.finish_reason is FinishReason.stop for rollout in valid]))
    return {
        "response/length_mean": float(lengths.mean()),
        "response/length_std": float(lengths.std()),
        "response/length_max": float(lengths.max()),
        "response/length_min": float(lengths.min()),
        "response/stop_fraction": stopped,
        "response/truncated_fraction": 1.0 - stopped,
    }


def _sampling_seed(seed: int, uid: str, index: int, number: int) -> int:
    """31 bits that differ between the responses of a prompt and between visits to it."""
    digest = hashlib.blake2b(f"{seed}/{uid}/{index}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first failure cancels the rest, waits for them, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        raise


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
