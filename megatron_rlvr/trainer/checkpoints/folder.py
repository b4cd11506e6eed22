"""The folder with a run's checkpoints: names, completeness, choice of what to keep. Files only; for rank 0.

A checkpoint is complete when it has its final name. Its manifest lists every file with its size and its SHA-256; a
line at the end is the SHA-256 of the manifest itself, so that a cut or foreign one is found out. Reading terabytes of
shards again is too much for one process: `CheckpointFolder.check` looks at sizes and at small files, the ranks share
the rest (`shards`, `first_corrupt`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SMALL_BYTES = 1 << 20
"""Files up to this size are read whenever a checkpoint is looked at."""
_NAME = re.compile(r"^step_(\d{6,})$")


class BrokenCheckpointError(RuntimeError):
    """A checkpoint lacks something; names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Which checkpoints stay."""

    last: int
    every: int
    best: bool


class CheckpointFolder:
    """``<run>/checkpoints``.

    Example:
        >>> folder = CheckpointFolder(run_dir / "checkpoints")
        >>> partial = folder.begin(step=12)
        >>> ...  # write
        >>> folder.commit(step=12, facts={"accuracy": 0.5}, checksums={})
        >>> newest, skipped = folder.newest({})
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written."""
        return self.path / f".step_{step:06d}.incomplete"

    def complete(self, step: int) -> Path:
        """Where it is when it is complete."""
        return self.path / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a final name, ascending; whether they are sound is not looked at."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for path in self.path.iterdir() if (match := _NAME.match(path.name)))

    def begin(self, step: int) -> Path:
        """An empty folder to write to; what an interrupted write has left is removed."""
        self.clean()
        partial = self.partial(step)
        partial.mkdir(parents=True)
        return partial

    def clean(self) -> None:
        """Removes unfinished checkpoints, and what is left of removed ones."""
        for pattern in (".step_*.incomplete", ".step_*.removed"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path)

    def commit(self, step: int, facts: dict[str, Any], checksums: Mapping[str, str]) -> Path:
        """Writes the manifest and gives the folder its name; one of the same step is replaced.

        Args:
            facts: what a reader of the manifest may want to know.
            checksums: SHA-256 by file name of what its writers have read already; the other files are read here.

        Raises:
            OSError: the disk is full, say; the folder then keeps its unfinished name.
        """
        partial, final = self.partial(step), self.complete(step)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        names = {str(path.relative_to(partial)): path for path in files}
        seals = {name: _seal(path, checksums.get(name)) for name, path in names.items()}
        body = json.dumps({"step": step, **facts, "files": seals})
        with (partial / MANIFEST).open("w", encoding="utf-8") as out:
            out.write(f"{body}\n{_sha256(body.encode())}\n")
            out.flush()
            os.fsync(out.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync_folder(self.path)
        return final

    def check(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint whose files are all there, of the right size; the small ones are read.

        Raises:
            BrokenCheckpointError: naming the file and what is wrong with it.
        """
        folder = self.complete(step)
        manifest = _read_manifest(folder)
        for name, seal in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise BrokenCheckpointError(f"{path} is missing")
            if (size := path.stat().st_size) != seal["bytes"]:
                raise BrokenCheckpointError(f"{path} has {size} bytes, the manifest says {seal['bytes']}")
            if size <= SMALL_BYTES and (reason := first_corrupt([(path, seal["sha256"])])) is not None:
                raise BrokenCheckpointError(reason)
        return manifest

    def shards(self, step: int) -> list[tuple[Path, str]]:
        """The files that `check` does not read, with their SHA-256; those of the oldest versions have none."""
        folder = self.complete(step)
        seals = _read_manifest(folder)["files"].items()
        return [(folder / name, seal["sha256"]) for name, seal in seals
                if seal["bytes"] > SMALL_BYTES and "sha256" in seal]  # fmt: skip

    def newest(self, corrupt: Mapping[int, str]) -> tuple[int | None, list[str]]:
        """The step of the newest sound checkpoint, and why newer ones were skipped, one line each.

        Args:
            corrupt: steps whose shards have been read and are not what was written, with the reason.
        """
        skipped = [f"{path.name} was not written to the end" for path in sorted(self.path.glob(".step_*.incomplete"))]
        for step in reversed(self.steps()):
            try:
                self.check(step)
                if step in corrupt:
                    raise BrokenCheckpointError(corrupt[step])
            except BrokenCheckpointError as error:
                skipped.append(f"{self.complete(step).name}: {error}")
            else:
                return step, skipped
        return None, skipped

    def prune(self, kept: Kept) -> list[int]:
        """Removes what is not to be kept; returns the steps removed."""
        steps = self.steps()
        keep = set(steps[-kept.last :])
        if kept.every:
            keep |= {step for step in steps if step % kept.every == 0}
        if kept.best and (best := self.best()) is not None:
            keep.add(best)
        removed = [step for step in steps if step not in keep]
        for step in removed:
            # Renamed first: half a checkpoint never has a final name.
            doomed = self.path / f".step_{step:06d}.removed"
            os.rename(self.complete(step), doomed)
            shutil.rmtree(doomed)
        return removed

    def best(self) -> int | None:
        """The step with the best held-out accuracy; the first of equals."""
        accuracies: list[tuple[float, int]] = []
        for step in self.steps():
            try:
                accuracy = _read_manifest(self.complete(step)).get("accuracy")
            except BrokenCheckpointError:
                continue
            if accuracy is not None:
                accuracies.append((accuracy, -step))
        return -max(accuracies)[1] if accuracies else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        body, seal, *_ = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise BrokenCheckpointError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read: {error}") from error
    if _sha256(body.encode()) != seal:
        raise BrokenCheckpointError(f"{path} does not hold what was written: its checksum differs")
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def first_corrupt(files: Sequence[tuple[Path, str]]) -> str | None:
    """Reads files to their end; what is wrong with the first whose SHA-256 is not the one given, None when none is."""
    for path, checksum in files:
        try:
            found = file_sha256(path)
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if found != checksum:
            return f"{path} does not hold what was written: its checksum differs"
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path, checksum: str | None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": checksum or file_sha256(path)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_folder(path: Path) -> None:
    """Makes a rename last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
