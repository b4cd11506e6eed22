"""What the metrics of a step say together with those before it: agreement of predictions, the law, and its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rlvr.report.samples import choose_samples
from megatron_rlvr.report.token_map import TokenMap, write_token_maps
from megatron_rlvr.trainer.diagnostics.look import response_places
from megatron_rlvr.trainer.diagnostics.measurements import TokenRecord
from megatron_rlvr.types import RolloutBatch

if TYPE_CHECKING:
    from megatron_rlvr.trainer.session import Session


def observe(run: Session, row: Mapping[str, Any]) -> dict[str, float]:
    """Shows a step's metrics, the same on every rank, to the monitors; events become lines on the console.

    Returns:
        ``dynamics/...``, ``agreement/...`` and ``law/...`` that go into the step's row.
    """
    found = run.dynamics.observe(row)
    news = run.law.observe(row)
    for note in news.notes:
        run.note(note)
    return found | news.metrics


def keep_tokens(
    run: Session, step: int, batch: RolloutBatch, advantages: Sequence[np.ndarray], records: Sequence[TokenRecord]
) -> None:
    """Writes some responses of a step token by token; nothing on steps without a look."""
    if not records:
        return
    places = response_places(batch.groups, run.config.train.updates_per_rollout)
    by_place = {(record.update, record.trajectory): record for record in records}
    samples = choose_samples(batch.groups, run.config.diagnostics.token_samples)
    shown = [(sample.group_index, sample.number) for sample in samples]
    maps = []
    for group_index, number in choose_maps(places, by_place, shown, count=run.config.diagnostics.token_samples):
        record, group = by_place[places[group_index, number]], batch.groups[group_index]
        maps.append(
            TokenMap(
                uid=group.prompt.uid,
                source=group.prompt.data_source,
                number=number,
                right=group.rollouts[number].correctness > 0.5,
                advantage=float(advantages[group_index][number]),
                pieces=run.tokenizer.pieces(group.rollouts[number].response_ids),
                logprobs=record.logprobs,
                entropy=record.entropy,
                covariance=record.covariance,
                selected=record.selected,
            )
        )
    write_token_maps(run.run_dir, step, maps)


def choose_maps(
    places: Mapping[tuple[int, int], tuple[int, int]],
    records: Mapping[tuple[int, int], TokenRecord],
    samples: Sequence[tuple[int, int]],
    *,
    count: int,
) -> list[tuple[int, int]]:
    """Responses to map: for one half those with the most selected tokens, then the step's samples, then more of the
    former.

    Args:
        places: (update, trajectory) by (group, number).
        records: by (update, trajectory).
        samples: (group, number) that are shown as text too.
        count: responses to choose at most.
    """
    known = [response for response, place in places.items() if place in records]
    selected = {response: sum(records[places[response]].selected) for response in known}
    telling = sorted((r for r in known if selected[r]), key=lambda r: (-selected[r], r))
    order = [*telling[: (count + 1) // 2], *[r for r in samples if r in selected], *telling]
    return list(dict.fromkeys(order))[:count]
