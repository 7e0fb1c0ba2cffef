# Every target sets up what it needs in .venv, from nothing but Python 3.11 or later, and is quick when it is there.
#
#   make demo    train a small Transformer with AdamW, Keras's Adafactor and ours, side by side
#   make test    every test, on every framework
#   make lint    ruff and mypy
#   make bench   step times against the peers, in this machine's terms
#
# ARGS goes to the program: make demo ARGS="--backend torch --steps 100"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml constraints.txt
PYTEST := $(BIN)/python -m pytest --quiet
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-core test-tensorflow test-jax test-torch lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/demo
	$(BIN)/adafactor demo $(ARGS)

test: test-core test-jax test-tensorflow test-torch

test-core: $(VENV)/test
	$(PYTEST) tests/core tests/cli

test-jax: $(VENV)/test
	KERAS_BACKEND=jax $(PYTEST) tests/keras

test-tensorflow: $(VENV)/test
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 $(PYTEST) tests/keras

test-torch: $(VENV)/test
	KERAS_BACKEND=torch $(PYTEST) tests/keras

lint: $(VENV)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/test
	@for backend in jax tensorflow torch; do \
	  KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python benchmarks/keras_step.py $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

# A file per set of packages, touched when it is installed; newer requirements install again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"Python must be 3.11 or later, got {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/demo: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/test: $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[demo,tensorflow,jax,torch]' --group test
	@touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) --group lint
	@touch $@
