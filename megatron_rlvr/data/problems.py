"""Problems: what a task source yields, and the train and validation sets of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from megatron_rlvr.config.schema import DataConfig, RewardConfig


@dataclass(kw_only=True, slots=True)
class Problem:
    """One problem before templating and tokenisation.

    Example:
        >>> Problem(uid="train/7", messages=[{"role": "user", "content": "2+2="}], answer="4", data_source="chain_sum")
    """

    uid: str
    """Split and index within it, e.g. ``train/7``."""
    messages: list[dict[str, Any]]
    """Conversation so far, ``role`` and ``content`` each; a plain prompt is one user message."""
    answer: Any
    """Reference answer as the verifier wants it."""
    data_source: str
    """Family or file tag."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """``reasoning_gym``: {family, params, entry} of a generated problem; ``file``, ``line``, ``row`` of a JSONL one."""


@dataclass(kw_only=True, slots=True)
class ProblemSet:
    """The two splits; no question of `train` is in `val`."""

    train: Sequence[Problem]
    val: Sequence[Problem]


class Concatenation(Sequence[Problem]):
    """Several sources one after the other, without copying."""

    def __init__(self, parts: Sequence[Sequence[Problem]]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise AssertionError("unreachable: the index was checked above")


def load_problems(config: DataConfig, reward: RewardConfig) -> ProblemSet:
    """The run's problems from reasoning-gym families, JSONL files, or both.

    Generated training problems are made on demand; validation problems and JSONL rows are read and checked here, so
    that a mistake shows within seconds. With both kinds `val_size` is divided in proportion to the sources' sizes.

    Args:
        config: sources, sizes and the split's seed.
        reward: its `verifier` says which answers a JSONL row may have.

    Raises:
        ValueError: no source, an unknown family or parameter, a broken row (named by file and line), or a validation
            split that cannot be disjoint from training.
    """
    if config.seed < 0:
        raise ValueError(f"data.seed must be at least 0, got {config.seed}")
    if config.train_size < 1:
        raise ValueError(f"data.train_size must be at least 1, got {config.train_size}")
    if config.val_size < 0:
        raise ValueError(f"data.val_size must be at least 0, got {config.val_size}")
    if not config.reasoning_gym and not config.jsonl:
        raise ValueError("data.reasoning_gym or data.jsonl must name at least one source of problems, got neither")

    rows: list[Problem] = []
    if config.jsonl:
        from megatron_rlvr.data.jsonl_source import read_rows, split_rows

        if reward.verifier == "reasoning_gym":
            raise ValueError("reward.verifier must not be 'reasoning_gym' for the rows of data.jsonl")
        plain_answers = reward.verifier in ("auto", "math", "exact")
        rows = read_rows(config.jsonl, plain_answers=plain_answers)
    if not config.reasoning_gym:
        train, val = split_rows(rows, val_size=config.val_size, seed=config.seed)
        return ProblemSet(train=train, val=val)

    # Imported here: reasoning-gym takes a second to import and a run on JSONL alone does not need it.
    from megatron_rlvr.data.reasoning_gym_source import generate

    row_share = 0
    if rows:
        row_share = round(config.val_size * len(rows) / (len(rows) + config.train_size))
        row_share = min(max(row_share, min(config.val_size, 1)), max(config.val_size - 1, 0))
    gym_train, gym_val = generate(
        config.reasoning_gym, seed=config.seed, train_size=config.train_size, val_size=config.val_size - row_share
    )
    if reward.verifier in ("math", "exact"):
        _require_answers(gym_train.samples(), reward.verifier)
    if not rows:
        return ProblemSet(train=gym_train, val=gym_val)
    row_train, row_val = split_rows(
        rows, val_size=row_share, seed=config.seed, first_train=len(gym_train), first_val=len(gym_val)
    )
    return ProblemSet(train=Concatenation([gym_train, row_train]), val=Concatenation([gym_val, row_val]))


def _require_answers(samples: Sequence[Problem], verifier: str) -> None:
    for problem in samples:
        if problem.answer is None:
            raise ValueError(
                f"reward.verifier must be 'auto' or 'reasoning_gym' for family {problem.data_source!r}, whose problems "
                f"have many right answers and no reference, got {verifier!r}"
            )
