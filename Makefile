# Two commands do everything on a fresh machine:
#   make demo    set up a virtual environment, train the embedded default, print where the report lies
#   make test    set up, lint, check types and layers, run every test that needs no GPU
# `make check` is the inner loop. PYTHON=/path/to/python3.12 chooses the interpreter, VENV=/path the environment.

VENV ?= .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints/ci-cpu.txt .ci/setup
# For two cores: some tests wait. A worker that is done takes over tests of another one, since the long ones are neighbours.
WORKERS ?= 3
SHARED := -n $(WORKERS) --dist worksteal
BUDGET_S ?= 540
GPU_PYTHON ?= $(or $(PYTHON),$(wildcard $(BIN)/python),python3)
export OMP_NUM_THREADS ?= 1

.NOTPARALLEL:
.PHONY: help setup demo test check lint format types contracts interpreted slow campaign results gpu multigpu wheel wheels \
	docs clean

help:
	@sed -n '2,4s/^# \{0,1\}//p' Makefile
	@echo "  make check   lint and the fast tests            make lint    ruff and codespell"
	@echo "  make gpu     all a GPU can tell in BUDGET_S=540 make docs    regenerate docs/configuration.md"
	@echo "  make multigpu  engines on several GPUs          make wheels  a folder of wheels for a machine without network"
	@echo "  make wheel   build both wheels and try them"
	@echo "  make slow    what is too long for make test     make results regenerate every table of the embedded default"
	@echo "  make campaign  kills, full disks, signals at every place (BUDGET_S seconds): docs/reliability.md"

# One stamp per set of extras: a finished set-up costs nothing the next time.
$(VENV)/.geoalign-base: $(INPUTS)
	@PYTHON="$(PYTHON)" .ci/setup $(VENV)
	@touch $@

$(VENV)/.geoalign-dev: $(INPUTS)
	@PYTHON="$(PYTHON)" .ci/setup $(VENV) dev
	@touch $@ $(VENV)/.geoalign-base

setup: $(VENV)/.geoalign-dev

demo: $(VENV)/.geoalign-base
	@$(BIN)/geoalign train --config tiny_cpu $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell geoalign kernels csrc configs profiling tests docs examples *.md

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup
	@$(BIN)/pyrefly check

contracts: setup
	@$(BIN)/lint-imports

interpreted: setup
	@.ci/interpreted $(BIN)/python

# Recipes of one line each, in this order, so that the first failing stage ends the run and pytest speaks last.
test: lint types contracts interpreted
	@$(BIN)/python -m pytest $(SHARED) -q -m "not slow"

check: lint types contracts
	@$(BIN)/python -m pytest $(SHARED) -q -m "not dist and not aot and not slow" tests/unit tests/parity tests/docs

slow: setup
	@$(BIN)/python -m pytest -q -m slow
	@$(BIN)/python tests/campaign/campaign.py

campaign: setup
	@$(BIN)/python tests/campaign/campaign.py $(ARGS)

results: setup
	@$(BIN)/python profiling/studies/results.py $(ARGS)

# On a rented machine: no set-up, no network, the torch that is there. docs/profiling.md says what to bring.
gpu:
	@$(GPU_PYTHON) profiling/gpu.py --budget-s $(BUDGET_S) $(ARGS)

multigpu:
	@$(GPU_PYTHON) profiling/gpu.py --multi --budget-s $(BUDGET_S) $(ARGS)

wheels:
	@profiling/wheels.sh $(ARGS)

docs: setup
	@$(BIN)/geoalign config docs --out docs/configuration.md

# Both wheels into dist/, each tried in a clean environment by the tests that otherwise build their own.
wheel: setup
	@rm -rf build kernels/build dist
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist . ./kernels
	@GEOALIGN_WHEELS=$(CURDIR)/dist $(BIN)/python -m pytest -q tests/packaging/test_wheel.py
	@rm -rf build kernels/build
	@ls dist

clean:
	rm -rf build kernels/build dist *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache
