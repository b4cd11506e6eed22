"""One evaluation of a model by its sets: generation through running servers, results on disk as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_rlvr.config.schema import EvalSetConfig, EvaluateConfig
from megatron_rlvr.reward.pool import VerifierPool
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.evaluate import EvalSet, evaluate_set
from megatron_rlvr.rollout.messages import Progress
from megatron_rlvr.rollout.respond import Responder
from megatron_rlvr.trainer.evaluation.records import (
    GREEDY,
    SAMPLED,
    Record,
    RecordWriter,
    is_complete,
    levels_of,
    read_records,
    record_of,
    summarize,
)
from megatron_rlvr.types import RolloutGroup

SETTINGS_FILE, SUMMARY_FILE, TABLE_FILE = "settings.json", "summary.json", "summary.md"
Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Summary = dict[str, dict[str, dict[str, float | int]]]


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the results' folder, or takes up one of the same settings.

    Raises:
        ValueError: it holds results of other settings; names the first that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        return
    present = json.loads(path.read_text(encoding="utf-8"))
    # The same weights may be named in two ways.
    for key in sorted({*present, *settings} - {"source"}):
        if key not in present or key not in settings or present[key] != settings[key]:
            raise ValueError(
                f"{folder} holds results of other settings: {key} was {present.get(key)!r} there, "
                f"is {settings.get(key)!r} now; give another name"
            )


def finished_uids(folder: Path, part: EvalSet) -> frozenset[str]:
    """Problems of a set that are answered already."""
    mode = GREEDY if part.greedy else SAMPLED
    return frozenset(
        record["uid"] for record in read_records(answers_path(folder, part.name)) if record["mode"] == mode
    )


def answers_path(folder: Path, name: str) -> Path:
    """Where the answers to a set lie."""
    return folder / f"{name}.jsonl"


async def answer_sets(
    parts: Sequence[EvalSet],
    config: EvaluateConfig,
    *,
    urls: Sequence[str],
    router_url: str | None,
    folder: Path,
    phase: Phase,
    note: Callable[[str], None],
) -> int:
    """Answers whatever is not answered yet, set after set.

    Args:
        parts: of `rollout.evaluate.build_sets`.
        urls: the servers.
        folder: results' folder.
        phase: shows a progress bar of the problems of a set.
        note: prints a line.

    Returns:
        Problems whose answers were aborted by the servers; they are not kept, and are asked again by the next call.

    Raises:
        RolloutError: a response could not be had.
    """
    rollout = config.rollout
    client = GenerationClient(
        list(urls),
        router_url=router_url,
        concurrency=rollout.concurrency,
        request_timeout_s=rollout.request_timeout_s,
        max_retries=rollout.max_retries,
    )
    aborted = 0
    try:
        await client.check()
        async with VerifierPool(config.reward) as verifier:
            responder = Responder(verifier=verifier, overlong=config.reward.overlong, seed=config.seed)
            for part in parts:
                done = finished_uids(folder, part)
                rest = part.without(done)
                if done:
                    note(f"{part.key}: {len(done)} of {len(part.prompts)} problems are answered already")
                if rest.prompts:
                    aborted += await _answer(rest, client, responder, folder, phase)
    finally:
        await client.close()
    return aborted


async def _answer(part: EvalSet, client: GenerationClient, responder: Responder, folder: Path, phase: Phase) -> int:
    aborted = 0
    shown = 0
    with RecordWriter(answers_path(folder, part.name)) as writer, phase(part.key, len(part.prompts)) as advance:

        def keep(group: RolloutGroup) -> None:
            nonlocal aborted
            if is_complete(group):
                writer.write(record_of(group, set_name=part.name, greedy=part.greedy))
            else:
                aborted += 1

        def on_progress(progress: Progress) -> None:
            nonlocal shown
            advance(progress.finished - shown)
            shown = progress.finished

        await evaluate_set(part, client=client, responder=responder, on_progress=on_progress, on_group=keep)
    return aborted


def write_summary(folder: Path, sets: Sequence[EvalSetConfig], settings: dict[str, Any], *, level: float,
                  seed: int) -> Summary:  # fmt: skip
    """Computes the numbers of all sets from the answers on disk and writes ``summary.json`` and ``summary.md``.

    Returns:
        By set, what `eval_records.summarize` gives.
    """
    summary = {
        spec.name: summarize(_wanted(read_records(answers_path(folder, spec.name)), spec), k=levels_of(spec),
                             level=level, seed=seed)
        for spec in sets
    }  # fmt: skip
    whole = {"settings": settings, "level": level, "sets": summary}
    (folder / SUMMARY_FILE).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = table(summary)
    rule = ["---"] * len(rows[0])
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
    (folder / TABLE_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return summary


def _wanted(records: Sequence[Record], spec: EvalSetConfig) -> list[Record]:
    """Records of the modes that the set asks for, one a problem and mode."""
    modes = {SAMPLED} if spec.num_samples else set()
    modes |= {GREEDY} if spec.greedy else set()
    kept = {(record["uid"], record["mode"]): record for record in records if record["mode"] in modes}
    return list(kept.values())


def table(summary: Summary) -> list[tuple[str, ...]]:
    """Heading and a row a set: estimates in per cent with their intervals."""
    estimates = list(dict.fromkeys(key for fields in summary.values() for key in fields if "mean" in fields[key]))
    rows = [("set", "problems", "answers", *estimates, "length", "cut off", "unparsable", "verifier failures")]
    for name, fields in summary.items():
        described = [fields[key] for key in ("sampled", "greedy_answers") if key in fields]
        answers = sum(int(each["num_samples"]) for each in described)
        cells = [_estimate(fields[key]) if key in fields else "–" for key in estimates]
        problems = max((int(fields[key]["num_problems"]) for key in estimates if key in fields), default=0)
        rows.append(
            (
                name,
                str(problems),
                str(answers),
                *cells,
                *(("–",) * 4 if not described else (
                    f"{sum(e['length_mean'] * e['num_samples'] for e in described) / answers:.1f}",
                    f"{sum(e['truncated_fraction'] * e['num_samples'] for e in described) / answers:.1%}",
                    f"{sum(e['unparsable_fraction'] * e['num_samples'] for e in described) / answers:.1%}",
                    str(sum(int(e["verifier_failures"]) for e in described)),
                )),
            )
        )  # fmt: skip
    return rows


def _estimate(fields: dict[str, float | int]) -> str:
    return f"{fields['mean']:.1%} [{fields['low']:.1%}, {fields['high']:.1%}]"
