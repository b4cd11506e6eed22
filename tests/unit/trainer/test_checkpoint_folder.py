"""Names, manifests and choice of checkpoints; files that a crash, a full disk or somebody else has left."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from megatron_rlvr.trainer.checkpoints.folder import (
    MANIFEST,
    BrokenCheckpointError,
    CheckpointFolder,
    Kept,
    first_corrupt,
)


def save(folder: CheckpointFolder, step: int, *, accuracy: float | None = None) -> Path:
    partial = folder.begin(step)
    (partial / "hf").mkdir()
    (partial / "hf" / "config.json").write_text("{}")
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * 8192)
    return folder.commit(step, {"accuracy": accuracy}, {})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_a_checkpoint_appears_with_its_name(folder: CheckpointFolder) -> None:
    assert folder.newest({}) == (None, [])
    partial = folder.begin(3)
    assert folder.steps() == []
    assert partial.is_dir()
    done = save(folder, 3)
    assert not partial.exists()
    assert folder.newest({}) == (3, [])
    assert done == folder.complete(3)
    manifest = folder.check(3)
    assert manifest["step"] == 3
    shard = done / "__0_0.distcp"
    checksum = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert manifest["files"]["__0_0.distcp"] == {"bytes": 2 << 20, "sha256": checksum}
    assert set(manifest["files"]["hf/config.json"]) == {"bytes", "sha256"}
    assert folder.shards(3) == [(shard, checksum)]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: truncate(path / "__0_0.distcp"), ["__0_0.distcp", "2097151 bytes", "2097152"]),
        (lambda path: (path / "__0_0.distcp").unlink(), ["__0_0.distcp", "missing"]),
        (lambda path: (path / "hf" / "config.json").write_text("{]"), ["config.json", "checksum"]),
        (lambda path: truncate(path / MANIFEST), []),
        (lambda path: os.truncate(path / MANIFEST, 30), [MANIFEST]),
        (lambda path: os.truncate(path / MANIFEST, 0), [MANIFEST]),
        (lambda path: (path / MANIFEST).unlink(), [MANIFEST, "missing"]),
        (lambda path: (path / MANIFEST).write_text('{"files": {}}\nabc\n'), [MANIFEST, "checksum"]),
    ],
    ids=["cut shard", "lost shard", "changed file", "no last newline", "cut", "empty", "none", "forged"],
)
def test_a_broken_one_is_named_and_the_one_before_is_taken(folder, harm, words) -> None:
    sound = save(folder, 2)
    harm(save(folder, 4))
    found, skipped = folder.newest({})
    if not words:  # what is cut off says nothing
        assert found == 4
        return
    assert found == 2
    assert sound == folder.complete(2)
    assert len(skipped) == 1
    assert all(word in skipped[0] for word in ["step_000004", *words])
    with pytest.raises(BrokenCheckpointError):
        folder.check(4)


def test_a_turned_byte_in_a_shard_is_found_by_reading_it(folder: CheckpointFolder) -> None:
    """Only then: a look at the folder reads small files alone."""
    save(folder, 2)
    shard = save(folder, 4) / "__0_0.distcp"
    assert first_corrupt(folder.shards(4)) is None
    with shard.open("r+b") as file:
        file.seek((2 << 20) - 7)
        file.write(b"!")
    assert folder.newest({}) == (4, [])
    reason = first_corrupt(folder.shards(4))
    assert reason == f"{shard} does not hold what was written: its checksum differs"
    assert folder.newest({4: reason}) == (2, [f"step_000004: {reason}"])


def test_what_a_writer_has_read_is_not_read_again(folder: CheckpointFolder) -> None:
    (folder.begin(2) / "__0_0.distcp").write_bytes(b"x")
    folder.commit(2, {}, {"__0_0.distcp": "of the writer"})
    assert folder.newest({})[1] == [
        f"step_000002: {folder.complete(2)}/__0_0.distcp does not hold what was written: its checksum differs"
    ]


def test_what_a_crash_left_is_named_and_removed_by_the_next_save(folder: CheckpointFolder) -> None:
    save(folder, 2)
    (folder.begin(4) / "__0_0.distcp").write_bytes(b"half")
    found, skipped = folder.newest({})
    assert found == 2
    assert skipped == [".step_000004.incomplete was not written to the end"]
    save(folder, 6)
    assert sorted(path.name for path in folder.path.iterdir()) == ["step_000002", "step_000006"]


def test_a_step_that_is_saved_again_replaces_the_first(folder: CheckpointFolder) -> None:
    save(folder, 2, accuracy=0.1)
    save(folder, 2, accuracy=0.2)
    assert folder.check(2)["accuracy"] == 0.2


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (Kept(last=1, every=0, best=False), [6]),
        (Kept(last=2, every=0, best=False), [5, 6]),
        (Kept(last=1, every=2, best=False), [2, 4, 6]),
        (Kept(last=1, every=0, best=True), [3, 6]),
        (Kept(last=9, every=0, best=True), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_is_kept(folder: CheckpointFolder, kept: Kept, left: list[int]) -> None:
    for step, accuracy in enumerate([0.1, None, 0.5, 0.5, None, 0.2], start=1):
        save(folder, step, accuracy=accuracy)
    removed = folder.prune(kept)
    assert folder.steps() == left
    assert sorted([*removed, *left]) == [1, 2, 3, 4, 5, 6]
    assert not list(folder.path.glob(".*"))


def test_a_checkpoint_whose_accuracy_cannot_be_read_is_not_the_best(folder: CheckpointFolder) -> None:
    save(folder, 1, accuracy=0.9)
    save(folder, 2, accuracy=0.5)
    (folder.complete(1) / MANIFEST).write_text("")
    assert folder.best() == 2


def test_a_full_disk_leaves_older_ones_alone(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 2)
    partial = folder.begin(4)
    (partial / "__0_0.distcp").write_bytes(b"x")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.commit(4, {}, {})
    assert folder.steps() == [2]
    assert folder.newest({})[0] == 2
    folder.clean()
    shutil.rmtree(folder.complete(2))
    assert not list(folder.path.iterdir())
