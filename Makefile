# make train   set up, then the quickstart to its end        make test   set up, then all tests
# make lint    style, types, floors                          make setup  only .venv
# make sanitize   the ops' tests under ASan and UBSan        make clean  removes what was built
#
# PYTHON=...   interpreter for .venv (3.11 or 3.12)          CUDA=0|1    which lock file; found out when not given
# TORCH_INDEX=URL  package index for torch alone, where the configured one has no build for this machine
# ARGS="..."   more Hydra overrides for train, or more pytest arguments for test
# TEST_JOBS=N  tests at a time (3 without a GPU); 0: one after the other in one process
# SGLANG=X.Y.Z another SGLang than the locked one for train and test, laid over .venv (on a CPU)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$p" && break; done)
CUDA ?= $(shell if [ -e /dev/nvidiactl ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then echo 1; else echo 0; fi)
ARGS ?=
SGLANG ?=
TORCH_INDEX ?=

VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements/$(if $(filter 1,$(CUDA)),cuda,cpu).txt
# Named by the content of the lock file: another lock is another stamp, a touched file is not.
LOCKED := $(VENV)/.locked-$(notdir $(basename $(LOCK)))-$(shell sha256sum $(LOCK) | cut -c1-12)
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -name '*.[ch]*')

# One thread a process where the user says nothing: trainer ranks and the server share the cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Half of a process's start would go into compiling what it imports, again for each of the dozen processes of a run.
unexport PYTHONDONTWRITEBYTECODE
# On all cores, where pip would take one; what is written for another Python, such as templates, does not compile.
compile = { PYTHONWARNINGS=ignore $(PY) -m compileall -q -j 0 -x '/site-packages/.*/tests?/' $(1) >/dev/null || true; }
PIP := $(PY) -m pip --no-input
# pip's log as a few lines a person can follow; errors pass, the rest is counted.
FOLLOW := awk -v total="$$(grep -c == $(LOCK))" ' \
	/^ *ERROR|^error|[Ee]rror:|No matching distribution/ { print; failed = 1; fflush(); next } \
	/^Collecting / { last = $$2 } \
	/^Collecting |^Processing |^Requirement already/ { if (++n % 25 == 0) { print "    " n " of " total " fetched"; fflush() } } \
	/^Installing collected/ { last = ""; print "    unpacking"; fflush() } \
	END { if (failed && last != "") print "    it failed at " last }'
FOLLOW_BUILD := awk ' \
	/megatron_rlvr: / { sub(/^ */, "    "); print; fflush() } \
	/^ *\[[0-9]+\/[0-9]+\]/ { print "    compiled " $$1; fflush() }'

.PHONY: help asked setup train test lint sanitize clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n 1,9p

# Without what it asks for, as the lock file for CPUs has it: all versions do with the locked packages.
ifneq ($(SGLANG),)
ifeq ($(CUDA),1)
$(error SGLANG must not be given on a machine with a GPU, got $(SGLANG): kernels belong to one version; make an environment with `pip install sglang==$(SGLANG)`)
endif
OTHER_SGLANG := $(CURDIR)/build/sglang/$(SGLANG)
WITH_SGLANG := PYTHONPATH=$(OTHER_SGLANG)$${PYTHONPATH:+:$$PYTHONPATH}
endif

$(CURDIR)/build/sglang/%: | $(LOCKED)
	@echo "==> SGLang $* beside $(VENV)"
	@rm -rf $@.part && $(PIP) install -q --no-deps --no-compile --target $@.part sglang==$* && $(call compile,$@.part) && mv $@.part $@

# Warnings of other people's packages at their import are not what a newcomer should read first.
train: setup $(OTHER_SGLANG)
	@PYTHONWARNINGS=$${PYTHONWARNINGS-ignore} $(WITH_SGLANG) $(PY) -m megatron_rlvr.launch --standalone --nproc-per-node 2 -m megatron_rlvr.train experiment=quickstart $(ARGS)

# Three at a time on two cores, as tests/conftest.py deals them, since real parts wait a lot; one at a time where they share a GPU.
TEST_JOBS ?= $(if $(filter 1,$(CUDA)),0,3)

test: setup $(OTHER_SGLANG)
	@$(WITH_SGLANG) $(PY) -m pytest -n $(TEST_JOBS) --no-loadscope-reorder $(ARGS)

lint: setup
	@echo "==> ruff";         $(PY) -m ruff check . && $(PY) -m ruff format --check .
	@echo "==> mypy";         $(PY) -m mypy
	@echo "==> floors";       PYTHONPATH=. $(VENV)/bin/lint-imports --no-logo
	@echo "==> clang-format"; find csrc -name '*.[ch]*' -exec $(VENV)/bin/clang-format --dry-run --Werror {} +

sanitize: setup
	@PYTHON=$(PY) tools/sanitize.sh $(ARGS)

setup: asked $(BUILT)

# Whoever names another Python than that of .venv is told, not ignored. (Here PYTHON= is of the command or its shell.)
asked:
ifneq (,$(filter command environment,$(origin PYTHON)))
	@[ ! -x $(PY) ] || [ ! -x "$$(command -v "$(PYTHON)")" ] || { version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	asked=$$("$(PYTHON)" -c "$$version"); there=$$($(PY) -c "$$version"); [ "$$asked" = "$$there" ] || \
		{ echo "error: PYTHON is $$asked, but $(VENV) was made with $$there: make clean first" >&2; exit 1; }; }
endif

$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or 3.12 must be on the path, or given as PYTHON=..." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: PYTHON must be 3.11 or 3.12, got {v[0]}.{v[1]} ($(PYTHON))")'
	@"$(PYTHON)" -c 'import os, sys, sysconfig as s; p = s.get_paths()["include"]; sys.exit(None if os.path.exists(p + "/Python.h") else f"error: Python.h is missing in {p}: install the headers (Debian: python3-dev)")'
	@echo "==> $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: cannot make $(VENV): install venv (Debian: python3-venv)" >&2; exit 1; }

$(LOCKED): | $(PY)
	@echo "==> $$(grep -c == $(LOCK)) packages of $(LOCK) (some minutes the first time)"
	@torch=$$(grep '^torch==' $(LOCK)); \
	$(PIP) install -qq --no-deps --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch" || \
		{ echo "error: $$torch is not to be had here for $$($(PY) --version); name an index that has it: make TORCH_INDEX=URL" \
			"(pytorch.org lists them)$(if $(filter 1,$(CUDA)),, or take the CUDA build (9 GB), which runs on a CPU too: make CUDA=1)" >&2; exit 1; }
	@$(PIP) install --no-deps --no-compile --progress-bar off -r $(LOCK) 2>&1 | tee $(VENV)/install.log | $(FOLLOW) || \
		{ echo "error: $(LOCK) was not installed; all that pip said: $(VENV)/install.log" >&2; exit 1; }
	@echo "    compiling them" && $(call compile,$(VENV)/lib)
	@rm -f $(VENV)/.locked-* && touch $@

$(BUILT): $(SOURCES) $(LOCKED)
	@echo "==> megatron_rlvr and its extension"
	@$(PIP) install -v --no-build-isolation --no-deps -e . 2>&1 | tee $(VENV)/build.log | $(FOLLOW_BUILD) || \
		{ tail -n 60 $(VENV)/build.log; echo "error: the build failed; all of its output: $(VENV)/build.log" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info megatron_rlvr/*.so
