"""One step's rollouts: draw prompts, sample G responses each, score every response as it ends, select groups."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_rlvr.config.schema import EvalConfig, GroupFilter, OverlongConfig, RolloutConfig
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.evaluate import HELD_OUT, EvalSet, OnGroup, evaluate_set
from megatron_rlvr.rollout.messages import RolloutError, Sampling
from megatron_rlvr.rollout.respond import (
    OnProgress,
    Reporter,
    Responder,
    Tally,
    Verifier,
    cancel_all,
    response_metrics,
)
from megatron_rlvr.rollout.selection import GroupSelector, Selection
from megatron_rlvr.types import EvalBatch, Prompt, RolloutBatch, RolloutGroup

logger = logging.getLogger(__name__)


class PromptSource(Protocol):
    """An endless stream of training prompts, numbered, in an order fixed by its seed."""

    num_too_long: int
    """Problems left out since the start."""
    num_broken: int

    def next(self, num_prompts: int) -> list[tuple[int, Prompt]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutGenerator:
    """Generates rollout batches and evaluations; holds the data order and the surplus of dynamic sampling.

    Args:
        verifier: where verdicts come from.
        stream: training prompts.
        validation: held-out prompts.
        rollout: batch size, sampling and filter.
        evaluation: sampling of the held-out prompts.
        eval_sets: further sets to evaluate.
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
        eval_sets: Sequence[EvalSet] = (),
    ) -> None:
        self.client: GenerationClient | None = None
        """Where responses come from; set before the first batch."""
        self._stream, self._rollout = stream, rollout
        self._responder = Responder(verifier=verifier, overlong=overlong, seed=seed)
        self._held_out = EvalSet(
            name=HELD_OUT,
            prompts=tuple(validation[: evaluation.max_problems]),
            sampling=Sampling(
                temperature=evaluation.temperature,
                top_p=1.0,
                top_k=-1,
                max_tokens=rollout.max_response_tokens,
                stop=tuple(rollout.stop),
            ),
            num_samples=evaluation.num_samples,
        )
        self._eval_sets = {each.key: each for each in eval_sets}
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
        tally = Tally()
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
        report = Reporter(on_progress, wanted=config.prompts_per_step, tally=tally, selector=selector)
        pending: set[asyncio.Task[RolloutGroup]] = set()
        done: set[asyncio.Task[RolloutGroup]] = set()
        try:
            while not selector.complete:
                if selector.num_to_draw:
                    prompts = self._stream.next(selector.num_to_draw)
                    selector.draw([index for index, _ in prompts])
                    for index, prompt in prompts:
                        name = f"{run}-s{step}-g{index}"
                        work = self._responder.group(
                            client, prompt, index, sampling, config.group_size, name, tally, report
                        )
                        pending.add(asyncio.create_task(work))
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    selector.finish(task.result())
                report()
        finally:
            await cancel_all([*pending, *done])
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
        self,
        *,
        policy_version: int,
        on_progress: OnProgress,
        max_problems: int | None = None,
        key: str | None = None,
        on_group: OnGroup | None = None,
    ) -> EvalBatch:
        """Answers to the held-out problems (the first ``eval.max_problems`` of them), in their fixed order.

        Args:
            max_problems: a smaller number of problems, for a quick look.
            key: a set of `eval_sets` instead of the held-out problems.
            on_group: called with every problem's answers as soon as all of them have their verdict.

        Raises:
            RolloutError: a response could not be had.
        """
        chosen = self._held_out if key is None else self._eval_sets[key]
        return await evaluate_set(
            chosen.first(max_problems),
            client=self._connected(policy_version),
            responder=self._responder,
            on_progress=on_progress,
            on_group=on_group,
        )

    def _connected(self, policy_version: int) -> GenerationClient:
        if self.client is None:
            raise RolloutError("the rollout process knows no servers yet: connect(urls) comes before generation")
        self.client.routing.min_version = policy_version
        return self.client


def _batch_metrics(selection: Selection, selector: GroupSelector, tally: Tally) -> dict[str, float]:
    return {
        "rollout/groups_generated": selector.num_drawn,
        "rollout/groups_accepted": selection.num_accepted,
        "rollout/groups_carried": selection.num_carried,
        "rollout/groups_surplus": len(selection.surplus),
        "rollout/groups_topped_up": selection.num_topped_up,
        **tally.metrics(),
        **response_metrics(selection.groups),
    }
