"""Runs that want the same warm start at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr.trainer.warm_cache import WarmCacheEntry, keep_first

ROOT = Path(__file__).resolve().parents[3]
MAKER = """
import sys, time
from pathlib import Path
from megatron_rlvr.trainer.warm_cache import WarmCacheEntry
entry = WarmCacheEntry(Path(sys.argv[1]))
assert entry.claim()
entry.draft.mkdir()
print("claimed", flush=True)
time.sleep(600)
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def test_one_makes_it_and_the_other_gets_the_result(tmp_path: Path) -> None:
    first, second = WarmCacheEntry(tmp_path / "key"), WarmCacheEntry(tmp_path / "key")
    assert first.finished is None
    assert first.claim()
    assert not second.claim()
    assert second.maker().startswith(f"process {os.getpid()} on ")
    warm = first.keep(write(first.draft, "first"))
    assert second.finished == warm
    assert second.claim(), "nobody makes it any more"
    second.release()
    second.release()
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["maker.txt", "warm"]


def test_a_maker_that_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    entry = WarmCacheEntry(tmp_path / "key")
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(entry.folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "claimed\n"
        assert not entry.claim()
        assert str(maker.pid) in entry.maker()
    finally:
        maker.kill()
        maker.wait()
    assert entry.claim()
    assert sorted(path.name for path in entry.folder.iterdir()) == ["maker.txt"], "its draft is gone"
    entry.release()


def test_without_locks_the_first_result_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = WarmCacheEntry(tmp_path / "key"), WarmCacheEntry(tmp_path / "key")
    assert first.claim()
    assert second.claim()
    results = [first.keep(write(tmp_path / "a", "first")), second.keep(write(tmp_path / "b", "second"))]
    assert results[0] == results[1] == first.finished
    assert (results[0] / "config.json").read_text() == "first"
    assert not (tmp_path / "b").exists()


def test_only_a_folder_that_is_there_keeps_the_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        keep_first(tmp_path / "nothing", tmp_path / "final")
