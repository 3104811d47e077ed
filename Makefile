# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: python3 (3.11 or newer) with venv, make and git are enough.
# A virtual environment belongs to one Python version, so PYTHON=python3.12 gets one of its own.

PYTHON ?= python3
WORKDIR ?= runs/quickstart
# Processes for the tests, and further arguments for pytest: make test ARGS="-k gptq -x"
JOBS ?= 2
ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The library alone, as a user has it; its development (libtpu, which the tests compile with,
# complains in every program on a machine without a TPU); the peers; the one peer that asks for an
# older transformers than the others; and the compiler for NVIDIA's GPUs.
VENV := .venv-$(VERSION)
DEV := .venv-dev-$(VERSION)
PEERS := .venv-peers-$(VERSION)
LLMC := .venv-llmcompressor-$(VERSION)
GPU := .venv-gpu-$(VERSION)
ENVIRONMENTS := $(VENV) $(DEV) $(PEERS) $(LLMC) $(GPU)
PINS := setup.py pyproject.toml constraints.txt
PIP := -m pip install --quiet --disable-pip-version-check --constraint
# The root stays off sys.path (-P, and the variable for what our processes start in turn): there
# kernels/ would shadow another package of that name.
export PYTHONSAFEPATH := 1
PYTEST := -P -m pytest --numprocesses $(JOBS)
SOURCES := setup.py .ci lib kernels experiments configs tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: help quickstart setup test test-all test-peers test-gpu-aot lint format types docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1|/' \
	  | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

quickstart: $(VENV)/.stamp  ## install the library and run configs/quickstart.py
	$(VENV)/bin/python -P -m treesurgeon.experiments.run --config=configs/quickstart.py --workdir=$(WORKDIR)
	@echo "The report is in $(WORKDIR)"

setup: $(DEV)/.stamp  ## install the library with everything its development needs
	@echo "$(DEV) is ready"

test: $(DEV)/.stamp  ## run the tests, the slow ones left out
	$(DEV)/bin/python $(PYTEST) -m "not slow" $(ARGS)

test-all: $(DEV)/.stamp  ## run the tests, the slow ones too
	$(DEV)/bin/python $(PYTEST) $(ARGS)

test-peers: $(PEERS)/.stamp $(LLMC)/.stamp  ## compare with transformers, peft, ... (own environments)
	LLMCOMPRESSOR_PYTHON=$(CURDIR)/$(LLMC)/bin/python $(PEERS)/bin/python $(PYTEST) tests/peers $(ARGS)

test-gpu-aot: $(GPU)/.stamp  ## compile the kernels for a GPU, which needs none (own environment)
	$(GPU)/bin/python $(PYTEST) tests/kernels/matmul/gpu_ahead_test.py $(ARGS)

lint: $(DEV)/.stamp  ## check style and formatting
	$(DEV)/bin/python -m ruff check $(SOURCES)
	$(DEV)/bin/python -m ruff format --check $(SOURCES)

format: $(DEV)/.stamp  ## rewrite the code in the agreed format
	$(DEV)/bin/python -m ruff check --fix $(SOURCES)
	$(DEV)/bin/python -m ruff format $(SOURCES)

types: $(DEV)/.stamp  ## check types
	$(DEV)/bin/python .ci/shim.py
	$(DEV)/bin/python -m pyright --pythonpath $(DEV)/bin/python

docs: $(DEV)/.stamp  ## regenerate docs/methods.md from the registry
	$(DEV)/bin/python -P -m treesurgeon.experiments.ledger

clean:  ## remove environments, caches and build output (runs/ stays)
	rm -rf .venv .venv-* .shim .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. A stamp is younger than what it was installed from, or it is made again.
$(ENVIRONMENTS:%=%/bin/python): %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "treesurgeon needs Python 3.11 or newer; name one with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $*

$(VENV)/.stamp: $(PINS) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) constraints.txt --editable .
	@touch $@

$(DEV)/.stamp: $(PINS) | $(DEV)/bin/python
	$(DEV)/bin/python $(PIP) constraints.txt --editable ".[dev,eval]"
	@touch $@

# torch comes first and alone: its requirements differ between its builds for CPU and for GPU.
$(PEERS)/.stamp: $(PINS) | $(PEERS)/bin/python
	$(PEERS)/bin/python $(PIP) constraints.txt torch==2.13.0
	$(PEERS)/bin/python $(PIP) constraints.txt --editable ".[peers]"
	$(PEERS)/bin/python $(PIP) constraints.txt --no-deps --no-build-isolation gptqmodel
	@touch $@

# jax's plugin alone: of CUDA's libraries none is needed to compile.
$(GPU)/.stamp: $(PINS) | $(GPU)/bin/python
	$(GPU)/bin/python $(PIP) constraints.txt --editable ".[test]"
	$(GPU)/bin/python $(PIP) constraints.txt --no-deps jax-cuda13-plugin jax-cuda13-pjrt
	@touch $@

# The script that runs there imports nothing of treesurgeon, which is therefore not installed.
$(LLMC)/.stamp: constraints-llmcompressor.txt | $(LLMC)/bin/python
	$(LLMC)/bin/python $(PIP) constraints-llmcompressor.txt torch==2.13.0
	$(LLMC)/bin/python $(PIP) constraints-llmcompressor.txt llmcompressor
	@touch $@
