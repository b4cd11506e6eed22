"""What a checkpoint holds beside weights and optimizer: how far the run is, where its data stands, its configuration.

The file is a pickle (rollout groups are Python objects) that is read with the run's own carriers and plain values
alone: a checkpoint from somebody else cannot run code.
"""

from __future__ import annotations

import importlib.metadata
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import megatron_rlvr
from megatron_rlvr.config.schema import RunConfig

STATE_FILE = "run_state.pkl"
FORMAT = 1

FREE = (
    *("experiment_name", "output_dir", "run_name", "parallel", "checkpoint", "logging", "ops", "sync", "eval"),
    *("model.path", "model.recompute", "model.logits_mb", "train.steps", "train.save_hf", "train.max_bad_updates"),
    *("train.max_tokens_per_microbatch", "train.elide_zero_advantage", "train.share_prompts", "warm_start.cache_dir"),
    *("rollout.urls", "rollout.router_url", "rollout.discovery", "rollout.server", "rollout.concurrency"),
    *("rollout.min_servers", "rollout.api_key_file"),
    *("rollout.request_timeout_s", "rollout.silence_timeout_s", "rollout.recovery_timeout_s", "rollout.max_retries"),
    *("rollout.record", "rollout.replay_from"),
    *("reward.num_workers", "reward.timeout_s", "reward.memory_limit_mb"),
)
"""Fields that a resumed run may change: where and how it runs, not what it learns."""
NOTED = ("optim",)
"""Fields that it may change too, which is worth a line."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Rollout steps whose updates are done."""
    bad_updates: int = 0
    """Updates in a row, up to now, whose loss or gradient was not finite."""
    start_accuracy: float | None = None
    """Held-out accuracy before training."""
    start_metrics: dict[str, float] = field(default_factory=dict)
    """All that was measured before training, for the row of the first step."""
    accuracy: float | None = None
    """Held-out accuracy of the last evaluation."""
    num_problems: int = 0
    """Held-out problems."""
    accuracy_at: int = 0
    """Step of the last evaluation."""
    unrecorded: dict[str, Any] | None = None
    """Metrics of `step` where its evaluation was interrupted: evaluated and written when the run goes on."""

    def count_bad_updates(self, skipped: Iterable[bool]) -> None:
        """Takes note of a step's updates."""
        for bad in skipped:
            self.bad_updates = self.bad_updates + 1 if bad else 0


@dataclass(kw_only=True, slots=True)
class RunState:
    """The content of `STATE_FILE`."""

    progress: Progress
    policy_version: int
    num_updates: int
    """Optimizer steps, skipped ones included: where the learning-rate schedule stands."""
    rollouts: dict[str, Any]
    """Data order and surplus groups."""
    stateful: dict[str, Any]
    """Of controllers and monitors, by name."""
    random: list[dict[str, Any]]
    """Of every rank."""
    layout: dict[str, Any]
    """World size and parallel config that `random` belongs to."""
    config: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """The content of the file.

        Raises:
            ValueError: something in it could not be read again.
        """
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        data = pickle.dumps({"format": FORMAT, **content, "progress": asdict(self.progress)})
        try:
            _PlainUnpickler(io.BytesIO(data)).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"a checkpoint can only hold plain values and arrays: {error}") from error
        return data

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state of a checkpoint.

        Raises:
            ValueError: it is of another format, or names classes that have no place in it.
        """
        path = folder / STATE_FILE
        try:
            content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}") from error
        if (found := content.pop("format", None)) != FORMAT:
            raise ValueError(f"{path} must be of format {FORMAT}, got {found!r}")
        return cls(**content | {"progress": Progress(**content["progress"])})


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def compare_configs(saved: Mapping[str, Any], current: RunConfig, *, origin: Path) -> list[str]:
    """Refuses a configuration that cannot continue a checkpoint; returns what has changed and may, one line each.

    Raises:
        ValueError: naming the field, its value in the checkpoint and the value given.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(plain_config(current)))
    notes = []
    for name in sorted(old.keys() & new.keys() - {"model.path"}):
        if old[name] == new[name] or _under(name, FREE):
            continue
        if not _under(name, NOTED):
            raise ValueError(
                f"{name} must be {old[name]!r} to resume from {origin}, got {new[name]!r} "
                f"(another run_name starts a run of its own)"
            )
        notes.append(f"{name} was {old[name]!r} and is {new[name]!r} from here on")
    return notes


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


class _PlainUnpickler(pickle.Unpickler):
    """Builds carriers, arrays and plain values only."""

    _MODULES = ("numpy", "collections", "datetime", "decimal", "fractions", "reasoning_gym")
    _BUILTINS = frozenset({"set", "frozenset", "complex", "bytearray", "slice", "range"})
    _ARRAY_MAKERS = frozenset({"_reconstruct", "_frombuffer", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if (module == "builtins" and name in self._BUILTINS) or module == "megatron_rlvr.types":
            return super().find_class(module, name)
        package = module.split(".")[0]
        if package in self._MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) or (package == "numpy" and name in self._ARRAY_MAKERS):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a run's state")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    names = ("torch", "megatron-core", "numpy", "sglang")
    found = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {"megatron-rlvr": megatron_rlvr.__version__, **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
