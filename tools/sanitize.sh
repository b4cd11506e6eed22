#!/usr/bin/env bash
# Runs the CPU twins and the emulated CUDA kernels under ASan and UBSan: builds the extension with both into
# build/sanitize and runs the ops' tests on it. No GPU and no rebuilt torch needed; a few minutes on two cores.
#   tools/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runtime() { "${CXX:-g++}" -print-file-name="$1"; }

export MEGATRON_RLVR_SANITIZE=1 MEGATRON_RLVR_CUDA=0
mkdir -p build
echo "==> building with ASan and UBSan"
"$python" setup.py -q build --build-base build/sanitize >build/sanitize.log 2>&1 || { tail -n 40 build/sanitize.log; exit 1; }
library=$(echo build/sanitize/lib.*)

echo "==> the ops' tests"
# torch is not built with the sanitizers, so they are loaded before it, and the C++ library with them, in which ASan
# looks for what throws. Leaks are not looked for: Python frees little at exit. Nothing is captured, or a report would
# die with the process. PYTHONPATH puts the package with the sanitized extension before the one that is installed.
export LD_PRELOAD="$(runtime libasan.so):$(runtime libubsan.so):$(runtime libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$PWD/$library:$PWD" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
(("$#")) || set -- tests/unit/csrc tests/unit/ops -k "not cuda_compiles and not gpu and not reference"
"$python" -P -m pytest -q -p no:cacheprovider --capture=no "$@"
