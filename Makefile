# make train   set up, then the quickstart to its end        make test   set up, then all tests
# make lint    style, types, floors                          make setup  only .venv
#
# PYTHON=...   interpreter for .venv (3.11 or 3.12)          CUDA=0|1    which lock file; found out when not given
# TORCH_INDEX=URL  package index for torch alone, where the configured one has no build for this machine
# ARGS="..."   more Hydra overrides for train, or more pytest arguments for test

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$p" && break; done)
CUDA ?= $(shell if [ -e /dev/nvidiactl ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then echo 1; else echo 0; fi)
ARGS ?=
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
PIP := $(PY) -m pip --no-input
# pip's log as a few lines a person can follow; errors pass, the rest is counted.
FOLLOW := awk -v total="$$(grep -c == $(LOCK))" ' \
	/^ *ERROR|^error|[Ee]rror:|No matching distribution/ { print; fflush(); next } \
	/^Collecting |^Processing |^Requirement already/ { if (++n % 25 == 0) { print "    " n " of " total " fetched"; fflush() } } \
	/^Installing collected/ { print "    unpacking"; fflush() }'
FOLLOW_BUILD := awk ' \
	/megatron_rlvr: / { sub(/^ */, "    "); print; fflush() } \
	/^ *\[[0-9]+\/[0-9]+\]/ { print "    compiled " $$1; fflush() }'

.PHONY: help setup train test lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n 1,6p

train: setup
	@$(VENV)/bin/torchrun --standalone --nproc-per-node 2 -m megatron_rlvr.train experiment=quickstart $(ARGS)

test: setup
	@$(PY) -m pytest $(ARGS)

lint: setup
	@echo "==> ruff";         $(PY) -m ruff check . && $(PY) -m ruff format --check .
	@echo "==> mypy";         $(PY) -m mypy
	@echo "==> floors";       PYTHONPATH=. $(VENV)/bin/lint-imports --no-logo
	@echo "==> clang-format"; find csrc -name '*.[ch]*' -exec $(VENV)/bin/clang-format --dry-run --Werror {} +

setup: $(BUILT)

$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or 3.12 must be on the path, or given as PYTHON=..." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: PYTHON must be 3.11 or 3.12, got {v[0]}.{v[1]} ($(PYTHON))")'
	@"$(PYTHON)" -c 'import os, sys, sysconfig as s; p = s.get_paths()["include"]; sys.exit(None if os.path.exists(p + "/Python.h") else f"error: Python.h is missing in {p}: install the headers (Debian: python3-dev)")'
	@echo "==> $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: cannot make $(VENV): install venv (Debian: python3-venv)" >&2; exit 1; }

$(LOCKED): | $(PY)
	@echo "==> $$(grep -c == $(LOCK)) packages of $(LOCK) (some minutes the first time)"
	@torch=$$(grep '^torch==' $(LOCK)); \
	$(PIP) install -qq --no-deps --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch"
	@$(PIP) install --no-deps --no-compile --progress-bar off -r $(LOCK) 2>&1 | $(FOLLOW)
	@rm -f $(VENV)/.locked-* && touch $@

$(BUILT): $(SOURCES) $(LOCKED)
	@echo "==> megatron_rlvr and its extension"
	@$(PIP) install -v --no-build-isolation --no-deps -e . 2>&1 | tee $(VENV)/build.log | $(FOLLOW_BUILD) || \
		{ tail -n 60 $(VENV)/build.log; echo "error: the build failed; all of its output: $(VENV)/build.log" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info megatron_rlvr/*.so
