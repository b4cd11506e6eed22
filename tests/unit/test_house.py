"""What CONTRIBUTING.md promises about the house itself."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
DUMPING_GROUNDS = {"util", "utils", "helper", "helpers", "common", "misc"}


def sources() -> Iterator[Path]:
    for top in ("megatron_rlvr", "tools", "slurm"):
        yield from sorted((ROOT / top).rglob("*.py"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [line.split("==", 1) for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in found), "a lock file has exact pins only"
    names = [canonicalize_name(name) for name, _ in found]
    assert len(set(names)) == len(names), "a package is pinned once"
    # Behind a comma stands which build of that version is not meant.
    return {canonicalize_name(name): version.partition(",")[0].partition("+")[0] for name, version in found}


def direct_requirements() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements" / "direct.in").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("lock", ["cpu.txt", "cuda.txt"])
def test_lock_files_pin_all_that_is_asked_for_directly(lock: str) -> None:
    locked = pins(lock)
    for requirement in direct_requirements():
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert locked["sglang"] == "0.5.21"


def test_a_cpu_build_of_a_second_index_is_not_taken_for_the_cuda_lock() -> None:
    # pip holds 2.13.0+cpu for higher than 2.13.0, and both for equal to it.
    [line] = [line for line in (ROOT / "requirements" / "cuda.txt").read_text().splitlines() if line[:7] == "torch=="]
    version = pins("cuda.txt")["torch"]
    builds = [version, f"{version}+cpu", f"{version}+cu130"]
    assert list(Requirement(line).specifier.filter(builds)) == [version, f"{version}+cu130"]


def test_both_lock_files_agree_on_what_defines_results() -> None:
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    for name in ("torch", "megatron-core", "sglang", "transformers", "tokenizers", "reasoning-gym", "math-verify"):
        assert cpu[name] == cuda[name], name


def test_files_and_functions_stay_short() -> None:
    too_long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert too_long == []


def is_submodule(package: ModuleType, name: str) -> bool:
    return hasattr(package, "__path__") and importlib.util.find_spec(f"{package.__name__}.{name}") is not None


def test_what_tools_import_of_the_package_is_there() -> None:
    missing = []
    for path in sources():
        if path.is_relative_to(ROOT / "megatron_rlvr"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_rlvr"):
                module = importlib.import_module(node.module or "")
                missing += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}"
                    for alias in node.names
                    if not hasattr(module, alias.name) and not is_submodule(module, alias.name)
                ]
    assert missing == []


def test_there_is_no_dumping_ground() -> None:
    folders = [path for path in (ROOT / "megatron_rlvr").rglob("*") if path.suffix in ("", ".py")]
    assert [path for path in folders if path.stem.lower() in DUMPING_GROUNDS] == []


def test_the_changelog_has_room_for_the_next_change() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("", "Python 3.11 or 3.12 must be on the path"),
        ("old", "PYTHON must be 3.11 or 3.12, got 3.9"),
    ],
)
def test_make_says_which_python_it_needs(tmp_path: Path, python: str, message: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("torch==0\n")
    if python:
        # The interpreter of these tests, saying that it is an older one.
        old = tmp_path / "old"
        pretence = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])"
        old.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{pretence}" "$2"\nexit 1\n')
        old.chmod(0o755)
        python = str(old)
    command = ["make", "-C", str(tmp_path), ".venv/bin/python", f"PYTHON={python}", "CUDA=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_does_not_ignore_another_python_than_that_of_the_environment(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("torch==0\n")
    other = tmp_path / ".venv" / "bin" / "python"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\necho 3.1\n")
    other.chmod(0o755)
    command = ["make", "-C", str(tmp_path), "asked", "CUDA=0"]
    done = subprocess.run(
        [*command, f"PYTHON={sys.executable}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert f"PYTHON is 3.{sys.version_info[1]}, but .venv was made with 3.1: make clean first" in done.stderr
    subprocess.run(command, timeout=300, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHON"})
