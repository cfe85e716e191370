# make serve   set up and serve the default model on http://127.0.0.1:8000 (PORT=9000 for another port)
# make test    set up and run lint, types and tests
# make test-full  the same with the cases that are too slow for every run (all shapes of the CUDA source)
# make lint    set up and run lint and types
# make format  set up and format the sources
# make clean   remove the virtual environment and caches; fetched models stay
#
# Every target sets up first: it makes .venv and installs into it; serve and test also compile the kernels, where there
# is a C++ compiler, and fetch the default model. What was done before takes no time, and what was interrupted goes on.

PORT ?= 8000
ARGS ?=

# The first Python of a version that all packages have wheels for, with venv and pip aboard.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$python && break; done)

# Processes that run tests: one of them those of the engines that many tests share, the other the rest (tests/spread.py).
# WORKERS=0 runs all tests in one process.
WORKERS ?= 2

# Where torch's CPU builds are published, for machines whose pip is not configured to find one.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin

.PHONY: serve test test-full ready lint format setup kernels model clean

serve: kernels
	@exec $(BIN)/slipstream serve --server.port $(PORT) $(ARGS)

test: ready
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-full: ready
	SLIPSTREAM_TEST_FULL=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# Types and kernels take a core each for half a minute.
ready: setup
	@$(MAKE) --no-print-directory -j 2 lint kernels model

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup:
	@python='$(PYTHON)'; test -n "$$python" || \
		{ echo 'setup: error: Python 3.11 to 3.14 with venv is needed; give one with PYTHON=...' >&2; exit 1; }; \
	exec $$python scripts/install.py --cpu-index $(CPU_INDEX)

kernels: setup
	@$(BIN)/python -m cuda_ext.build cpu --if-possible

model: setup
	@$(BIN)/python -m server.model_store

clean:
	rm -rf .venv cuda_ext/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
