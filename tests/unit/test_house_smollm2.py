"""tools/get_smollm2.py without its download: what is there stays, what is not a model folder is refused."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def get_smollm2(output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "get_smollm2.py"), "--output", str(output)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    done = get_smollm2(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path} is there already\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = get_smollm2(tmp_path)
    assert done.returncode == 2
    assert f"--output must be a folder that does not exist yet or holds the model, got {tmp_path}" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
