# Every target sets up what it needs: on a fresh machine, `make demo` or `make test` is the first and only command.

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= 2
BENCH_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo fetch test readme quality style bench hardware

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv with the pinned packages (does nothing when it is up to date)

# constraints.txt is renewed by installing the extras without it and keeping the `name==version` lines of
# `pip freeze` (torch without its +cpu).
# torch first: it is the largest by far, and everything after it then takes the build that is already there.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing fmaq into $(VENV): a few minutes the first time ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[cli,hf,hardware,test,dev]'
	@touch $@

demo: setup ## Train, quantize and fine-tune a small CNN on scikit-learn's digits, and print the table
	@$(BIN)/fmaq demo $(DEMO_ARGS)

fetch: setup ## Download the pretrained networks and data that examples/ needs (200 MB)
	@$(BIN)/python examples/fetch.py

test: setup ## Run the tests in JOBS=2 processes, of which one that is done takes over from another (PYTEST_ARGS="-k formats" picks some)
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS)

readme: setup ## Run README's commands one after the other, in quick form, in a copy as a fresh clone has it
	@$(BIN)/python .ci/readme.py

quality: setup ## Check lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy src

style: setup ## Fix what lint can fix, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## Measure speed and memory against float32 torch (BENCH_ARGS="--suite gemm" picks some)
	@$(BIN)/fmaq bench $(BENCH_ARGS)

hardware: setup ## Synthesize the accumulators of docs/hardware.md, prove them, and print the tables
	@$(BIN)/fmaq hardware prove
	@$(BIN)/fmaq hardware table
