"""Problems of reasoning-gym families, made on demand and deterministic in (seed, split, index).

A family seeds problem i with its own seed + i, and some families also plan over their whole size. So each family is
cut into blocks of `BLOCK` problems, one reasoning-gym dataset a block, built when first touched; training and
validation draw from far apart seed ranges, and a training problem whose question is held out is replaced by another.

Three families of reasoning-gym 0.1.25 (isomorphic_strings, polynomial_multiplication, ransom_note) iterate over sets
of strings: they repeat only under a fixed ``PYTHONHASHSEED``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, overload

import numpy as np
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

from megatron_rlvr.config.schema import ReasoningGymSpec
from megatron_rlvr.data.problems import Problem

BLOCK = 4096
"""Problems per reasoning-gym dataset; word_ladder allows at most 20,000."""
_VAL_OFFSET = 2**30
"""Distance of the validation seeds from the training seeds; the sums stay below numpy's 2**32."""
_MAX_REPLACEMENTS = 1000
"""Draws for a training problem that is not held out."""


class Family:
    """One configured family: problem `position` of a split, for any position."""

    def __init__(self, spec: ReasoningGymSpec, *, seed: int, place: int) -> None:
        """
        Args:
            spec: name and parameters.
            seed: of the run's data.
            place: position in the mixture, so that a family listed twice does not repeat its problems.
        """
        self.name = spec.name
        self.params = dict(spec.params)
        self._base = int(np.random.default_rng([seed, place, *spec.name.encode()]).integers(0, _VAL_OFFSET))
        self._block = lru_cache(maxsize=16)(self._build_block)

    def entry(self, position: int, *, val: bool) -> dict[str, Any]:
        """reasoning-gym's own entry: ``question``, ``answer``, ``metadata``."""
        block, offset = divmod(position, BLOCK)
        try:
            return self._block(block, val)[offset]
        except Exception as error:  # 105 generators, each with failures of its own
            raise ValueError(
                f"reasoning-gym family {self.name!r} cannot make problem {position} of its "
                f"{'validation' if val else 'training'} range: {type(error).__name__}: {error}"
            ) from error

    def problem(self, entry: Mapping[str, Any], uid: str) -> Problem:
        return Problem(
            uid=uid,
            messages=[{"role": "user", "content": entry["question"]}],
            answer=entry["answer"],
            data_source=self.name,
            metadata={"reasoning_gym": {"family": self.name, "params": self.params, "entry": dict(entry)}},
        )

    def _build_block(self, block: int, val: bool) -> ProceduralDataset:
        seed = self._base + block * BLOCK + (_VAL_OFFSET if val else 0)
        return create_dataset(self.name, size=BLOCK, seed=seed, **self.params)


class GeneratedProblems(Sequence[Problem]):
    """The training split: `size` problems, each made when asked for, none of them held out."""

    def __init__(
        self, families: Sequence[Family], weights: Sequence[float], *, seed: int, size: int, held_out: set[str]
    ) -> None:
        self._families = families
        self._size = size
        self._held_out = held_out
        # Which family each problem is of; its position within the family counts the earlier ones.
        choices = np.random.default_rng([seed, 1]).choice(len(families), size=size, p=np.array(weights) / sum(weights))
        self._family_N = choices.astype(np.int32)
        self._position_N = np.zeros(size, dtype=np.int64)
        for place in range(len(families)):
            mine = self._family_N == place
            self._position_N[mine] = np.arange(mine.sum())
        self._count_F = np.maximum(np.bincount(self._family_N, minlength=len(families)), 1)

    def __len__(self) -> int:
        return self._size

    def samples(self) -> list[Problem]:
        """The first problem of each family.

        Raises:
            ValueError: validation used a family up (better here than in the middle of the run).
        """
        return [self[int(index)] for index in np.unique(self._family_N, return_index=True)[1]]

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(f"index must be in 0..{self._size - 1}, got {index}")
        place = int(self._family_N[index])
        family, position = self._families[place], int(self._position_N[index])
        for _ in range(_MAX_REPLACEMENTS):
            entry = family.entry(position, val=False)
            if entry["question"] not in self._held_out:
                return family.problem(entry, f"train/{index}")
            position += int(self._count_F[place])  # behind all first choices
        raise ValueError(
            f"data.val_size must leave problems to train on: {_MAX_REPLACEMENTS} draws from reasoning-gym family "
            f"{family.name!r} with {family.params} gave only held-out questions"
        )


def generate(
    specs: Sequence[ReasoningGymSpec], *, seed: int, train_size: int, val_size: int
) -> tuple[GeneratedProblems, list[Problem]]:
    """The splits of a family or a weighted mixture.

    Args:
        specs: families with weights and parameters.
        seed: of the run's data.
        train_size: length of the training split.
        val_size: number of validation problems, distinct questions, divided over the families by weight.

    Raises:
        ValueError: an unknown family or parameter, a bad value, or a family too small for a disjoint validation split.
    """
    for spec in specs:
        _check_spec(spec)
    families = [Family(spec, seed=seed, place=place) for place, spec in enumerate(specs)]
    weights = [spec.weight for spec in specs]
    held_out: set[str] = set()
    val: list[Problem] = []
    for family, quota in zip(families, _quotas(weights, val_size), strict=True):
        for entry in _distinct_entries(family, quota, held_out):
            val.append(family.problem(entry, f"val/{len(val)}"))
    train = GeneratedProblems(families, weights, seed=seed, size=train_size, held_out=held_out)
    train.samples()
    return train, val


def _distinct_entries(family: Family, quota: int, held_out: set[str]) -> Iterator[dict[str, Any]]:
    """`quota` validation entries with questions not seen before, which enter `held_out`."""
    found = 0
    for position in range(quota * 50 + 100):
        if found == quota:
            return
        entry = family.entry(position, val=True)
        if entry["question"] not in held_out:
            held_out.add(entry["question"])
            found += 1
            yield entry
    if found < quota:
        raise ValueError(
            f"data.val_size must not exceed the distinct problems there are: {quota} wanted of reasoning-gym family "
            f"{family.name!r} with {family.params}, {found} found in {quota * 50 + 100} draws"
        )


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, largest remainders first."""
    shares = [weight * total / sum(weights) for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: quotas[place] - shares[place])
    for place in by_remainder[: total - sum(quotas)]:
        quotas[place] += 1
    return quotas


def _check_spec(spec: ReasoningGymSpec) -> None:
    if spec.name not in DATASETS or spec.name == "composite":
        near = difflib.get_close_matches(spec.name, DATASETS, n=5, cutoff=0.4)
        hint = f"near names: {', '.join(near)}" if near else f"there are {len(DATASETS)}, e.g. chain_sum, countdown"
        raise ValueError(f"data.reasoning_gym name must be a reasoning-gym family, got {spec.name!r} ({hint})")
    if not spec.weight > 0:
        raise ValueError(f"data.reasoning_gym weight of {spec.name!r} must be positive, got {spec.weight}")
    config_class: Any = DATASETS[spec.name][1]
    fields = [field.name for field in dataclasses.fields(config_class) if field.name not in ("seed", "size")]
    for name in spec.params:
        if name in ("seed", "size"):
            raise ValueError(
                f"data.reasoning_gym params of {spec.name!r} must not set {name!r}: use data.seed and sizes"
            )
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
            raise ValueError(
                f"data.reasoning_gym params of {spec.name!r} must be among {sorted(fields)}, got {name!r}"
                + (f" (near: {', '.join(near)})" if near else "")
            )
    try:
        create_dataset(spec.name, size=BLOCK, seed=0, **spec.params)
    except Exception as error:  # the families check with asserts, ValueErrors and accidents
        raise ValueError(
            f"data.reasoning_gym params of {spec.name!r} must suit the family, got {spec.params}: "
            f"{type(error).__name__}: {error}"
        ) from error
