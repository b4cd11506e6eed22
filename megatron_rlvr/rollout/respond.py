"""One prompt's responses: sampled, scored as each ends, counted. What batches and evaluations have in common."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_rlvr.config.schema import OverlongConfig
from megatron_rlvr.reward.overlong import overlong_penalty
from megatron_rlvr.rollout.answer import Sample
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.messages import Progress, Sampling
from megatron_rlvr.rollout.selection import GroupSelector
from megatron_rlvr.types import FinishReason, Prompt, Rollout, RolloutGroup, Score, VerifierStatus

T = TypeVar("T")
OnProgress = Callable[[Progress], None]
PROGRESS_EVERY_S = 0.2


class Verifier(Protocol):
    """Scores responses; never raises for what a response contains."""

    async def score(self, prompt: Prompt, response_text: str) -> Score: ...


@dataclass(kw_only=True, slots=True)
class Tally:
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


class Reporter:
    """Passes progress on, a few times a second."""

    def __init__(self, on_progress: OnProgress, *, wanted: int, tally: Tally, selector: GroupSelector | None) -> None:
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


class Responder:
    """Samples and scores the responses of a prompt.

    Args:
        verifier: where verdicts come from.
        overlong: the penalty on long responses.
        seed: of the sampling seeds sent to the servers.
    """

    def __init__(self, *, verifier: Verifier, overlong: OverlongConfig, seed: int) -> None:
        self._verifier, self._overlong, self._seed = verifier, overlong, seed

    async def group(
        self,
        client: GenerationClient,
        prompt: Prompt,
        index: int,
        sampling: Sampling,
        count: int,
        name: str,
        tally: Tally,
        report: Reporter,
    ) -> RolloutGroup:
        """The scored responses of one prompt.

        Args:
            index: position in the data order; with the number of a response it decides the sampling seed.
            count: responses.
            name: prefix of the request ids, unique over the servers' lifetime.

        Raises:
            RolloutError: a response could not be had.
        """
        with client.place(count) as placement:

            async def respond(number: int) -> Rollout:
                seed = _sampling_seed(self._seed, prompt.uid, index, number) if sampling.temperature > 0 else None
                sample = await client.generate(
                    prompt.input_ids, sampling, rid=f"{name}-r{number}", placement=placement, seed=seed
                )
                tally.add(sample)
                report()
                return await self._judge(prompt, sample, tally)

            rollouts = await gather_all(respond(number) for number in range(count))
        report.num_groups += 1
        return RolloutGroup(prompt=prompt, rollouts=rollouts, index=index)

    async def _judge(self, prompt: Prompt, sample: Sample, tally: Tally) -> Rollout:
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


def response_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
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


async def gather_all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first failure cancels the rest, waits for them, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await cancel_all(tasks)
        raise


async def cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
