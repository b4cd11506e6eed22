"""The problems of named evaluation sets, and the checks of their settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.config.schema import EvalSetConfig, RewardConfig
from megatron_rlvr.data.problems import Problem

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
RESERVED = ("held_out", "accuracy", "start_accuracy", "num_problems")
"""Taken by what is measured on the held-out problems."""
FETCHED_DIR = "eval_sets"
"""Name of the folder that tools/get_eval_sets.py writes."""


def check_sets(sets: Sequence[EvalSetConfig], field: str) -> None:
    """Refuses settings that contradict each other or would have no effect.

    Args:
        field: where the sets stand, for messages, e.g. ``eval.sets``.

    Raises:
        ValueError: naming the set and the setting.
    """
    for each in sets:
        _check_set(each, f"{field} {each.name!r}")
    names = [each.name for each in sets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{field} must have distinct names, got {name!r} {names.count(name)} times")


def _check_set(spec: EvalSetConfig, where: str) -> None:
    if not NAME.fullmatch(spec.name) or spec.name in RESERVED:
        raise ValueError(f"{where}: name must be letters, digits, '_', '-', '.' and none of {', '.join(RESERVED)}")
    if bool(spec.jsonl) == bool(spec.reasoning_gym):
        raise ValueError(f"{where}: exactly one of jsonl and reasoning_gym must be given, got "
                         f"{'both' if spec.jsonl else 'neither'}")  # fmt: skip
    if spec.size is not None and spec.size < 1:
        raise ValueError(f"{where}: size must be at least 1, got {spec.size}")
    if spec.reasoning_gym and spec.size is None:
        raise ValueError(f"{where}: size must be given for reasoning_gym, whose families never end, got null")
    if spec.jsonl and spec.seed != 0:
        raise ValueError(f"{where}: seed has no effect on jsonl, which is read in order, got {spec.seed}")
    if spec.num_samples < 0 or (spec.num_samples == 0 and not spec.greedy):
        raise ValueError(f"{where}: num_samples must be at least 1, or 0 with greedy=true, got {spec.num_samples}")
    if spec.num_samples == 0:
        for name, value, default in (("temperature", spec.temperature, 0.7), ("k", list(spec.k), [1])):
            if value != default:
                raise ValueError(f"{where}: {name} has no effect while num_samples is 0, got {value}")
        return
    if spec.temperature <= 0:
        raise ValueError(f"{where}: temperature must be positive (greedy=true asks for a greedy answer, "
                         f"num_samples=0 for that alone), got {spec.temperature}")  # fmt: skip
    if not 0 < spec.top_p <= 1:
        raise ValueError(f"{where}: top_p must be in (0, 1], got {spec.top_p}")
    if not spec.k or len(set(spec.k)) != len(spec.k) or not all(1 <= k <= spec.num_samples for k in spec.k):
        raise ValueError(f"{where}: k must be distinct numbers in [1, num_samples={spec.num_samples}], got {spec.k}")
    if spec.max_response_tokens is not None and spec.max_response_tokens < 1:
        raise ValueError(f"{where}: max_response_tokens must be at least 1, got {spec.max_response_tokens}")


def check_files(sets: Sequence[EvalSetConfig]) -> None:
    """Names every file of problems that is missing, and how to get it, before anything costly begins.

    Raises:
        ValueError: a file does not exist.
    """
    missing = {spec.name: [name for name in spec.jsonl if not Path(name).is_file()] for spec in sets}
    lines = [f"evaluation set {name!r}: {_missing(files[0])}" for name, files in missing.items() if files]
    if lines:
        raise ValueError("\n".join(lines))


def load_set(spec: EvalSetConfig, reward: RewardConfig) -> list[Problem]:
    """The problems of a set, with uids ``<name>/<index>``.

    Raises:
        ValueError: a missing file (with the command that fetches it, where there is one), a broken row by file and
            line, an unknown family, or more problems asked for than there are.
    """
    try:
        problems = _read(spec, reward) if spec.jsonl else _generate(spec)
    except ValueError as error:
        raise ValueError(f"evaluation set {spec.name!r}: {error}") from error
    return [replace(problem, uid=f"{spec.name}/{index}") for index, problem in enumerate(problems)]


def _read(spec: EvalSetConfig, reward: RewardConfig) -> list[Problem]:
    from megatron_rlvr.data.jsonl_source import read_rows

    for name in spec.jsonl:
        if not Path(name).is_file():
            raise ValueError(_missing(name))
    if reward.verifier == "reasoning_gym":
        raise ValueError("reward.verifier must not be 'reasoning_gym' for the rows of jsonl")
    rows = read_rows(spec.jsonl, plain_answers=reward.verifier in ("auto", "math", "exact"))
    if spec.size is not None and spec.size > len(rows):
        raise ValueError(f"size must be at most the {len(rows)} rows of its files, got {spec.size}")
    return rows[: spec.size]


def _missing(name: str) -> str:
    path = Path(name)
    if path.parent.name != FETCHED_DIR:
        return f"jsonl must name existing files, got {name!r}"
    return (
        f"{name!r} does not exist; `python tools/get_eval_sets.py {path.stem}` writes it where a package holds these "
        "problems and says so where none does (then bring a file of your own: rows with prompt and answer)"
    )


def _generate(spec: EvalSetConfig) -> list[Problem]:
    # Imported here: reasoning-gym takes a second to import and files alone do not need it.
    from megatron_rlvr.data.reasoning_gym_source import generate

    assert spec.size is not None, "checked by check_sets"
    _, problems = generate(spec.reasoning_gym, seed=spec.seed, train_size=1, val_size=spec.size)
    return problems
