"""Builds the package and its extension `megatron_rlvr._C`, for the CPU alone or with the CUDA twins.

CUDA is chosen by the toolchain, not by a visible device (a login node has none): nvcc and a torch built for CUDA.
`MEGATRON_RLVR_CUDA=0` or `=1` overrides the choice; `MEGATRON_RLVR_SANITIZE=1` builds with ASan and
UBSan (tools/sanitize.sh). torch is not a build requirement, so that pip never fetches a
second one: the extension is built against the torch that is installed in the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as plain_build_ext

ROOT = Path(__file__).parent
CUDA_ARCHITECTURES = ((8, 0), (9, 0), (10, 0))
FIRST_NVCC_WITH_SM100 = (12, 8)
NO_TORCH = """\
megatron_rlvr's extension is compiled against the torch of this environment, and none is installed here.
Install one first, a CPU or a CUDA build of torch>=2.11,<2.15, then repeat `pip install -e .`."""

INSTALL_REQUIRES = [
    "torch>=2.11,<2.15",
    "megatron-core>=0.16.1,<0.20",
    "hydra-core>=1.3.2",
    "omegaconf>=2.3",
    "numpy>=1.26",
    "safetensors>=0.4.5",
    "transformers>=4.57",
    "tokenizers>=0.22",
    "aiohttp>=3.9",
    "orjson>=3.9",
    "jinja2>=3.1",
    "requests>=2.31",
    "psutil>=5.9",
    "rich>=13.7",
    "math-verify[antlr4-9-3]>=0.8",
    "reasoning-gym>=0.1.19",
    "tensorboard>=2.16",
]
EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]>=2.8"],
    "sglang": ["sglang>=0.5.17,<0.5.24", "sglang-router>=0.3"],
    "slurm": ["hydra-submitit-launcher>=1.2"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.8",
        "mypy>=1.13",
        "import-linter>=2.1",
        "pre-commit>=4",
        "clang-format>=18",
    ],
}


def version() -> str:
    """The one version string, read without importing the package."""
    text = (ROOT / "megatron_rlvr" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def import_torch():
    """torch of the environment that is installed into, also from inside pip's isolated build; None without one."""
    for name in ("purelib", "platlib"):
        path = sysconfig.get_path(name)
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def find_nvcc() -> Path | None:
    """nvcc by CUDA_HOME or CUDA_PATH, then PATH, then /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(found)] if found else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.exists()), None)


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """(major, minor) as nvcc reports it."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def toolkit(nvcc: Path) -> Path:
    """The CUDA folder that nvcc (maybe a wrapper script) belongs to, by its own word."""
    words = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], check=True, capture_output=True, text=True)
    return Path(re.search(r"TOP=(.+)", words.stderr)[1]).resolve()


def choose_cuda(torch) -> Path | None:
    """nvcc if the CUDA twins are to be built, else None; prints which and why."""
    asked = os.environ.get("MEGATRON_RLVR_CUDA", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MEGATRON_RLVR_CUDA must be 0 or 1, got {asked!r}")
    nvcc = find_nvcc()
    if asked == "0":
        reason = "MEGATRON_RLVR_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is not built for CUDA"
    elif nvcc is None:
        reason = "nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    else:
        names = " ".join(f"sm_{major}{minor}" for major, minor in architectures(nvcc))
        print(f"megatron_rlvr: building _C with CUDA {torch.version.cuda} ({nvcc}; {names})", flush=True)
        return nvcc
    if asked == "1":
        raise RuntimeError(f"MEGATRON_RLVR_CUDA=1, but {reason}")
    print(f"megatron_rlvr: building _C for the CPU only: {reason}", flush=True)
    return None


def architectures(nvcc: Path) -> list[tuple[int, int]]:
    """The compute capabilities to build for that this nvcc knows."""
    known = nvcc_version(nvcc) >= FIRST_NVCC_WITH_SM100
    return [arch for arch in CUDA_ARCHITECTURES if known or arch < (10, 0)]


def extension_of(torch) -> tuple[Extension, type]:
    """The extension and its build command, for the torch at hand."""
    nvcc = choose_cuda(torch)
    if nvcc is not None:
        os.environ.setdefault("CUDA_HOME", str(toolkit(nvcc)))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(f"{a}.{b}" for a, b in architectures(nvcc)))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/ops/*.cpp"))
    sources += sorted(ROOT.glob("csrc/ops/cpu/*.cpp"))
    # OpenMP's code but not its library: torch's runtime serves both; a second would double the threads.
    flags = {"cxx": ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]}
    if os.environ.get("MEGATRON_RLVR_SANITIZE") == "1":
        flags["cxx"] += ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    macros = [("MEGATRON_RLVR_VERSION", f'"{version()}"')]
    if nvcc is not None:
        sources += sorted(ROOT.glob("csrc/ops/cuda/*.cpp")) + sorted(ROOT.glob("csrc/ops/cuda/*.cu"))
        flags["nvcc"] = ["-O3", "-Xcompiler", "-fvisibility=hidden"]
        macros.append(("MEGATRON_RLVR_WITH_CUDA", None))
    extension = (CppExtension if nvcc is None else CUDAExtension)(
        "megatron_rlvr._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=flags,
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))],
    )
    return extension, BuildExtension


class BuildWithoutTorch(plain_build_ext):
    """Stands in where torch is missing, so that metadata can still be read."""

    def run(self) -> None:
        raise RuntimeError(NO_TORCH)


def build_parts() -> tuple[Extension, type]:
    """What to build; the plain stand-in for commands that only read metadata, which must not need torch."""
    builds = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}
    torch = import_torch() if builds & set(sys.argv) else None
    if torch is None:
        return Extension("megatron_rlvr._C", ["csrc/bindings.cpp"]), BuildWithoutTorch
    return extension_of(torch)


extension, build_command = build_parts()
setup(
    name="megatron-rlvr",
    version=version(),
    description="Reinforcement learning with verifiable rewards on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["megatron_rlvr", "megatron_rlvr.*"]), "megatron_rlvr.configs"],
    package_dir={"megatron_rlvr": "megatron_rlvr", "megatron_rlvr.configs": "configs"},
    package_data={"megatron_rlvr.configs": ["*.yaml", "**/*.yaml"], "megatron_rlvr": ["py.typed", "report/page.*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    ext_modules=[extension],
    cmdclass={"build_ext": build_command},
    zip_safe=False,
)
