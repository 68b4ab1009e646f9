# Every target makes its own environment: a fresh clone needs python3 (3.11 or newer) with venv, and make.
# Pins live in constraints.txt and nowhere else.

PYTHON ?= python3
WORKERS ?= 2
# The benchmark tables to run; by default each file of benchmarks/ that is a command.
TABLES ?= $(patsubst benchmarks/%.py,%,$(shell grep -l '^if __name__' benchmarks/*.py))
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# The build backend comes from constraints.txt too, so the editable install builds without a second, unpinned environment.
TITHE_INSTALL := $(PIP_INSTALL) --no-build-isolation --editable
# One thread a process: with several workers more threads only wait for each other, and sums keep one order.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpu test-device test-slow lint format bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.train ## fine-tune on the embedded images with every method, print one table (two to four minutes)
	$(BIN)/tithe demo

test: $(VENV)/.dev ## the quick test suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.dev ## the slow suite: longer runs, bigger models, compiled graphs
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

# In a process of its own: autograd counts the devices at its first backward pass, and never again.
test-device: $(VENV)/.dev ## every method on a GPU, or on a pretended one, against the CPU
	$(ONE_THREAD) $(BIN)/python -m pytest -m device -n $(WORKERS) --dist worksteal tests/device

# Kernels are chosen by processor and number of threads: CONTRIBUTING.md says what each of these stands for.
test-cpu: $(VENV)/.dev ## the quick suite as other processors would run it, an hour on 2 cores
	set -e; for setting in MKL_CBWR=COMPATIBLE "MKL_ENABLE_INSTRUCTIONS=SSE4_2 ATEN_CPU_CAPABILITY=default"; do \
		echo "$$setting"; env $(ONE_THREAD) $$setting $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal; done
	set -e; for n in 2 4; do echo "$$n threads"; \
		env OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$$n MKL_NUM_THREADS=$$n TITHE_TEST_THREADS=$$n $(BIN)/python -m pytest -n 1; done

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench ## the benchmark tables, hours on 2 cores but resumable; one of them: make bench TABLES=accuracy
	set -e; for table in $(TABLES); do $(BIN)/python -m benchmarks.$$table; done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"tithe needs Python 3.11 or newer and found {v}: name one, for example make PYTHON=python3.12 test")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) hatchling editables
	$(TITHE_INSTALL) '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(TITHE_INSTALL) '.[train,dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.train
	$(TITHE_INSTALL) '.[train,bench]'
	@touch $@
