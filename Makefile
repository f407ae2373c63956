# make demo, make test: each works on a fresh machine that has Python >= 3.11 and make. A second call does not reinstall.
PYTHONS := python3.11 python3.12 python3.13 python3
# one name a call: some shells look up the first only
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(shell command -v $(name) 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt
# a process a core, each on one thread: twice as fast as one process on all cores
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help demo test test-slow test-matrix lint bench gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(or $(PYTHON),$(error expected Python >= 3.11 on the PATH, found none (PYTHON=/path/to/python names one))) -m venv $(VENV)

$(VENV)/.base: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.'
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[dev,gguf,lora,tensorboard]'
	touch $@ $(VENV)/.base

$(VENV)/.peers: $(VENV)/.dev
	$(INSTALL) '.[peers]'
	touch $@

demo: $(VENV)/.base  ## train a tiny model on real preferences, under a minute
	$(BIN)/dpo demo

test: $(VENV)/.dev  ## the quick tests
	$(PYTEST)

test-slow: $(VENV)/.dev  ## the tests marked slow, without the compile matrix
	$(PYTEST) -m slow -k "$(SLOW)" --durations 10

test-matrix: $(VENV)/.dev  ## compile every kernel for every target and launch configuration (a quarter of an hour)
	$(PYTEST) -m matrix

lint: $(VENV)/.dev  ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(VENV)/.peers  ## step time and memory beside TRL, the padded mode and the floor
	$(BIN)/python -m pytest -q -s bench/bench_step.py --benchmark-only

gpu-check: $(VENV)/.dev  ## on a GPU: correctness, then speed, into bench/results/gpu.json
	$(BIN)/python -m pytest -q -m gpu tests
	$(BIN)/python -m bench.gpu_check --output bench/results/gpu.json

clean:  ## remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
