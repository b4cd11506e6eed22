import os
import threading
from pathlib import Path

import pytest

from megatron_rlvr.report import run_directory


def test_latest_points_to_the_newest_run_and_survives_a_move(tmp_path: Path) -> None:
    first = run_directory(tmp_path / "out", "quickstart")
    second = run_directory(tmp_path / "out", "other")
    assert first.is_dir()
    assert first.parent == tmp_path / "out" / "quickstart"
    assert (tmp_path / "out" / "latest").resolve() == second
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert (moved / "latest").resolve() == moved / "other" / second.name


def test_concurrent_starts_never_share_a_folder(tmp_path: Path) -> None:
    runs: list[Path] = []
    threads = [threading.Thread(target=lambda: runs.append(run_directory(tmp_path, "e"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(runs)) == 8
    assert (tmp_path / "latest").resolve() in runs
    assert sorted(os.listdir(tmp_path)) == ["e", "latest"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "latest"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="experiment_name must be .*" + (f"got '{name}'" if name else "")):
        run_directory(tmp_path, name)


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir must be a folder to write in, got '.*file'"):
        run_directory(tmp_path / "file", "e")


def test_a_folder_called_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "kept").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        run_directory(tmp_path, "e")
    assert (tmp_path / "latest" / "kept").read_text() == "mine"
    assert not list(tmp_path.glob(".latest-*"))
