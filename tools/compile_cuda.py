"""Compiles every CUDA source for every architecture of the build and refuses register spills; needs no GPU.

    python tools/compile_cuda.py [--arch 80 90 100]

Kernels (csrc/ops/cuda/*.cu) hold no torch header and are compiled by nvcc to machine code. Their host parts
(csrc/ops/cuda/*.cpp) are type-checked against torch's headers; they are compiled for good only where torch itself is
built for CUDA (setup.py). Exit status: 0 all well (also without nvcc, saying so), 1 an error or a spill.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90, 100)
# What ptxas says of one kernel, over three lines.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, the path or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and Path(path).exists()), None)


def toolkit(nvcc: str) -> Path:
    """The CUDA folder that nvcc (maybe a wrapper script) belongs to, by its own word."""
    words = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    match = re.search(r"TOP=(.+)", words.stderr)
    assert match is not None, f"{nvcc} --dryrun must name its folder, got {words.stderr!r}"
    return Path(match[1]).resolve()


def readable(symbol: str) -> str:
    """A kernel's name without its namespaces and arguments."""
    if shutil.which("c++filt") is None:
        return symbol
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return text.split(")::", 1)[-1].split("(")[0]


def compile_kernels(nvcc: str, source: Path, architecture: int, folder: Path) -> list[str]:
    """Compiles one .cu file, prints a line a kernel, returns what is wrong."""
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", "-v", "-c", str(source), "-o", str(folder / "out.o")]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return [f"{source.name} for sm_{architecture}:\n{result.stderr}"]
    problems = []
    for match in KERNEL.finditer(result.stderr):
        name, spilled = readable(match["name"]), int(match["stores"]) + int(match["loads"])
        print(f"sm_{architecture:<4}{match['registers']:>4} registers {spilled:>4} B spilled  {name}", flush=True)
        if spilled:
            problems.append(f"{name} spills {spilled} bytes on sm_{architecture}")
    return problems


def check_host_part(compiler: str, cuda_include: Path, source: Path, folder: Path) -> list[str]:
    """Type-checks the ATen-facing side of a kernel; returns what is wrong."""
    # The one header that only a CUDA build of torch generates; what it defines concerns shared libraries.
    generated = folder / "generated" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True, exist_ok=True)
    generated.touch()
    include = Path(torch.__file__).parent / "include"
    folders = [CSRC, include, include / "torch" / "csrc" / "api" / "include", cuda_include, folder / "generated"]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-DMEGATRON_RLVR_WITH_CUDA", str(source)]
    result = subprocess.run([*command, *(f"-I{path}" for path in folders)], capture_output=True, text=True)
    print(f"host  type-check {'passed' if result.returncode == 0 else 'failed'}  {source.name}", flush=True)
    return [] if result.returncode == 0 else [f"{source.name}:\n{result.stderr}"]


def main(arguments: list[str] | None = None) -> int:
    """Compiles and checks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc on this machine: the CUDA sources were not compiled")
        return 0
    cuda_include = toolkit(nvcc) / "include"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in sorted(CSRC.glob("ops/cuda/*.cu")):
            for architecture in options.arch:
                problems += compile_kernels(nvcc, source, architecture, folder)
        for source in sorted(CSRC.glob("ops/cuda/*.cpp")):
            problems += check_host_part(compiler, cuda_include, source, folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
