"""The matrix of a comparison: methods x seeds on one task, read from a file of ``configs/compare/``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_rlvr.config.compose import load_config
from megatron_rlvr.config.schema import RunConfig

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
MIN_SEEDS = 3
"""Over fewer seeds a difference is never called clear: two may agree by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the comparison."""

    name: str
    """Folder name and key."""
    label: str
    """What a reader calls it."""
    overrides: tuple[str, ...]
    """Hydra overrides on top of the matrix's ``base``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a method under a seed."""

    method: Method
    seed: int
    overrides: tuple[str, ...]
    """All Hydra overrides of the run but where it writes."""

    @property
    def name(self) -> str:
        return f"{self.method.name}/seed-{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Names the overrides; a finished cell of another fingerprint is not this cell."""
        return hashlib.sha256(json.dumps(self.overrides).encode()).hexdigest()[:16]

    def config(self) -> RunConfig:
        """The run's composed configuration.

        Raises:
            ValueError: an override is wrong; the message names the cell.
        """
        try:
            return _composed(self.overrides)
        except ValueError as error:
            raise ValueError(f"cell {self.name}: {error}") from error


@cache
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    return load_config(overrides)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """What is compared.

    Example:
        >>> matrix = read_matrix(Path("configs/compare/chain_sum.yaml"))
        >>> [cell.name for cell in matrix.cells()][:2]
        ['grpo/seed-0', 'grpo_clip_higher/seed-0']
    """

    name: str
    title: str
    note: str
    """What a reader must know about the task, its size and its limits; paragraphs divided by blank lines."""
    baseline: str
    """Method that the others are measured against, seed by seed."""
    seeds: tuple[int, ...]
    base: tuple[str, ...]
    methods: tuple[Method, ...]

    def cells(self) -> list[Cell]:
        """All runs; a whole seed comes before the next, so that an unfinished comparison compares complete seeds."""
        return [
            Cell(
                method=method,
                seed=seed,
                overrides=(*self.base, *method.overrides, f"train.seed={seed}"),
            )
            for seed in self.seeds
            for method in self.methods
        ]


def read_matrix(path: Path, *, seeds: tuple[int, ...] | None = None) -> Matrix:
    """Reads and checks a matrix file; every cell's configuration is composed once.

    Args:
        path: YAML with ``name``, ``title``, ``baseline``, ``seeds``, ``base``, ``methods`` and optionally ``note``.
        seeds: instead of those in the file.

    Raises:
        ValueError: the file or one of its overrides is wrong; names the field, or the cell.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"matrix file {str(path)!r} must be readable YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"matrix file {str(path)!r} must hold a mapping, got {type(given).__name__}")
    known = {field.name for field in fields(Matrix)}
    required = known - {"note"}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{path}: unknown keys {unknown}; known are {sorted(known)}")
    if missing := sorted(required - set(given)):
        raise ValueError(f"{path}: needs {missing}")
    methods = _methods(path, given["methods"])
    matrix = Matrix(
        name=_name(path, "name", given["name"]),
        title=str(given["title"]),
        note=str(given["note"]) if "note" in given else "",
        baseline=str(given["baseline"]),
        seeds=_seeds(path, list(seeds) if seeds is not None else given["seeds"]),
        base=_overrides(path, "base", given["base"]),
        methods=methods,
    )
    if matrix.baseline not in {method.name for method in methods}:
        raise ValueError(f"{path}: baseline must be one of the methods, got {matrix.baseline!r}")
    for cell in matrix.cells()[: len(methods)]:
        cell.config()
    return matrix


def _methods(path: Path, given: Any) -> tuple[Method, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{path}: methods must map a name to its overrides, got {given!r}")
    methods = []
    for name, body in given.items():
        if isinstance(body, Mapping):
            if unknown := sorted(set(body) - {"label", "overrides"}):
                raise ValueError(f"{path}: methods.{name} has unknown keys {unknown}")
            label, overrides = str(body["label"]) if "label" in body else str(name), body.get("overrides")
        else:
            label, overrides = str(name), body
        methods.append(
            Method(
                name=_name(path, f"methods.{name}", name),
                label=label,
                overrides=_overrides(path, f"methods.{name}", overrides),
            )
        )
    return tuple(methods)


def _name(path: Path, field: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{path}: {field} must be a name of lower-case letters, digits, '_', '-', '.', got {value!r}")
    return value


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    right = isinstance(value, list) and value and all(isinstance(s, int) and s >= 0 for s in value)
    if not right or len(set(value)) != len(value):
        raise ValueError(f"{path}: seeds must be distinct integers of at least 0, got {value!r}")
    return tuple(value)


def _overrides(path: Path, field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {field} must be a list of Hydra overrides (text), got {value!r}")
    for item in value:
        key = item.partition("=")[0].lstrip("+~")
        if key in ("train.seed", "output_dir", "rollout.urls"):
            raise ValueError(f"{path}: {field} must leave {key} to the comparison, got {item!r}")
    return tuple(value)
