# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv on a fresh machine
# and again when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

DEMO_ARGS ?= --workers 2 --shards 2
PYTEST_ARGS ?=
# Tests that start processes wait half of the time.
TEST_JOBS ?= 2
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long chaos lint audit bench bench-peers clean install install-dev

help:
	@echo "make demo    train a small model on this machine; DEMO_ARGS='$(DEMO_ARGS)'"
	@echo "make test    lint, then the tests; PYTEST_ARGS='-m \"not ray\"' to choose"
	@echo "make test-long   the tests that take long, one after the other: half an hour"
	@echo "make chaos   two minutes of kills; what was lost is counted"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make audit   known vulnerabilities of the pinned packages; asks the package index"
	@echo "make bench   the experiment behind the numbers in the README"
	@echo "make bench-peers    distbelief beside Ray, torch RPC and gloo, at the same work"
	@echo "make clean   remove builds, caches and run folders, not .venv"

demo: install
	$(BIN)/distbelief launch $(DEMO_ARGS)

test: lint
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup $(PYTEST_ARGS)

test-long: install-dev
	DISTBELIEF_TEST_LONG=1 $(BIN)/python -m pytest -m long $(PYTEST_ARGS)

chaos: install-dev
	$(BIN)/distbelief chaos --json

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not a part of test: it needs the package index, and says something new without any change of ours. Strict:
# what could not be looked up is an error, not a pass.
audit: $(BIN)/python
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install -q pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench: install-dev
	$(BIN)/python tests/bench/fashion_mnist.py $(BENCH_ARGS)

bench-peers: install-dev
	$(BIN)/python tests/bench/peers.py $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info runs htmlcov .coverage .coverage.*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

# With the development tools the plain installation is there too.
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	    f"distbelief needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}; " \
	    "name another one: make PYTHON=python3.12 test")'
	$(PYTHON) -m venv $(VENV)
