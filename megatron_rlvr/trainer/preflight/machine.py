"""What a run needs of the machine it starts from: packages, free disk, ports."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
from pathlib import Path

from packaging.version import Version

from megatron_rlvr.config.schema import RolloutSource, RunConfig, Transport
from megatron_rlvr.rollout.engine import FIRST_VERSION, VERSION_BEFORE
from megatron_rlvr.rollout.ports import HIGHEST, LOWEST, free_port
from megatron_rlvr.trainer.preflight.memory_estimate import BYTES
from megatron_rlvr.trainer.preflight.report import Row, Status, gib

SUPPORTED = {
    "torch": ("2.11", "2.15"),
    "megatron-core": ("0.16.1", "0.20"),
    "sglang": (FIRST_VERSION, VERSION_BEFORE),
    "transformers": ("5.0", None),
    "reasoning-gym": ("0.1.25", None),
    "math-verify": ("0.9", None),
    "psutil": ("5.9", None),
}
"""First version, and the one before which it must be. psutil: without it Megatron's checkpoints hang."""
SPARE = 1.1
"""Free disk beyond what is counted."""


def check_packages(config: RunConfig) -> list[Row]:
    """Packages of this environment against those that the project was tried with."""
    others = config.rollout.urls or config.rollout.discovery or config.rollout.source is RolloutSource.replay
    optional = {"sglang"} if others else set()
    if not config.data.reasoning_gym:
        optional.add("reasoning-gym")
    wrong, found = [], []
    for name, (first, before) in SUPPORTED.items():
        wanted = f"{name}>={first}" + (f",<{before}" if before else "")
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in optional:
                wrong.append(f"{wanted} is not installed")
            continue
        version = Version(text)
        if version < Version(first) or (before is not None and version >= Version(before)):
            wrong.append(f"{wanted} is needed, {text} is installed")
        found.append(f"{name} {text}")
    if wrong:
        return [Row(subject="packages", status=Status.error, finding="; ".join(wrong), advice="run make setup")]
    return [Row(subject="packages", status=Status.ok, finding=", ".join(found))]


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> int:
    """One checkpoint: weights in the model's dtype, and fp32 weights and both moments of Adam."""
    b = BYTES[config.model.dtype]
    return num_parameters * (b + 12 if b < 4 else 12)


def check_disk(config: RunConfig, num_parameters: int) -> Row:
    """Free disk under `output_dir` against checkpoints to keep, exports and weights on their way to servers."""
    b = BYTES[config.model.dtype]
    parts: dict[str, int] = {}
    saved = config.checkpoint
    periodic = saved.every > 0
    # The one being written is there beside those that are kept.
    kept = saved.keep_last + 1 if periodic else 1
    if periodic and saved.keep_every:
        kept += config.train.steps // saved.keep_every
    kept += int(saved.keep_best)
    parts[f"{kept} checkpoints"] = kept * checkpoint_bytes(config, num_parameters)
    exports = int(config.train.save_hf)
    exports += config.train.steps // saved.export_hf_every if saved.export_hf_every else 0
    if exports:
        parts[f"{exports} exports"] = exports * num_parameters * b
    if config.sync.transport is Transport.disk:
        parts["weights for the servers"] = 2 * num_parameters * b
    needed = int(sum(parts.values()) * SPARE)
    folder = _existing(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    finding = (
        f"{gib(needed)} needed in {folder} ({', '.join(f'{n} {gib(size)}' for n, size in parts.items())}), "
        f"{gib(free)} free"
    )
    if needed > free:
        advice = "change output_dir, checkpoint.keep_last or checkpoint.keep_every"
        return Row(subject="disk", status=Status.error, finding=finding, advice=advice)
    return Row(subject="disk", status=Status.ok, finding=finding)


def check_ports(config: RunConfig) -> Row:
    """Whether servers could listen where they shall."""
    if config.rollout.urls or config.rollout.discovery or config.rollout.source is RolloutSource.replay:
        return Row(subject="ports", status=Status.skipped, finding="this run starts no servers")
    host = config.rollout.server.host
    try:
        free_port(host)
    except (OSError, socket.gaierror) as error:
        finding = f"no port between {LOWEST} and {HIGHEST} can be had on {host}: {error}"
        return Row(subject="ports", status=Status.error, finding=finding, advice="change rollout.server.host")
    finding = f"ports between {LOWEST} and {HIGHEST} are free on {host}; each server takes one"
    return Row(subject="ports", status=Status.ok, finding=finding)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
