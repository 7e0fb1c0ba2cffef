# Every target sets up what it needs in .venv, from nothing but Python 3.11 or later, and is quick when it is there.
#
#   make demo    train a small Transformer with AdamW, Keras's Adafactor and ours, side by side
#   make test    every test, on every framework
#   make test-zero  DeepSpeed's own engine, in an environment of its own
#   make lint    ruff and mypy
#   make docs    the pages of docs/ as a site, in build/docs
#   make bench   step times against the peers, in this machine's terms
#   make gpu     registers, spills and instructions of the Triton kernels, compiled for devices that need not be there; estimates
#   make paper   the paper's stability findings on a small Transformer, as a table and a picture
#   make doctor  versions, the kernels in use, and what does not work
#   make wheel   the wheel, built without any framework, then installed beside the oldest and newest of each and tested
#   make sanitize  the native kernels under the address, undefined-behaviour and thread sanitizers
#
# ARGS goes to the program: make demo ARGS="--backend torch --steps 100"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# An editable install knows the modules that were there when it was made: another list of files is another install.
FILES := $(sort $(shell find src -name '*.py'))
MODULES := $(shell echo $(FILES) | cksum | cut -d' ' -f1)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
# What XLA compiles is kept for the other tests and for the next time: many compile the same.
KEPT := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# Workers with a thread each; a file stays with one of them, for the sake of its fixtures.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 $(KEPT) $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist loadfile
ARGS ?=

# The longest first.
PARTS := test-sharded test-torch test-robustness test-core test-keras-tensorflow test-keras-jax test-optax test-convert \
         test-keras-torch test-docs

.DEFAULT_GOAL := help
.PHONY: help demo doctor paper test $(PARTS) test-zero lint format docs bench gpu wheel sanitize clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/demo.$(MODULES)
	$(BIN)/python examples/demo $(ARGS)

doctor: $(VENV)/test.$(MODULES)
	$(BIN)/adafactor doctor

# Two parts at a time, each in one process: with workers a part imports its frameworks three times.
test: $(VENV)/docs.$(MODULES)
	@$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) WORKERS=0 $(PARTS)

test-core: $(VENV)/test.$(MODULES)
	$(PYTEST) tests/core tests/cli tests/examples

test-torch: $(VENV)/test.$(MODULES)
	$(PYTEST) tests/torch tests/engine/torch tests/hosts --ignore tests/engine/torch/sharded

test-sharded: $(VENV)/test.$(MODULES)
	$(PYTEST) tests/engine/torch/sharded

test-optax: $(VENV)/test.$(MODULES)
	$(PYTEST) tests/optax tests/engine/xla

test-convert: $(VENV)/test.$(MODULES)
	$(PYTEST) tests/convert tests/planning

# Pages, links, recipes, and the site.
test-docs: $(VENV)/docs.$(MODULES)
	$(PYTEST) tests/docs

# Once per backend: Keras reads it when it is imported.
test-keras-jax test-keras-tensorflow test-keras-torch: test-keras-%: $(VENV)/test.$(MODULES)
	KERAS_BACKEND=$* $(PYTEST) tests/keras

# ARGS="--times 20": twenty times as many examples, kills and steps.
test-robustness: $(VENV)/test.$(MODULES)
	KERAS_BACKEND=torch $(PYTEST) tests/robustness $(ARGS)
	KERAS_BACKEND=jax $(PYTEST) tests/robustness/test_keras_properties.py $(ARGS)

# DeepSpeed is fastidious about what else is installed, so it has an environment of its own.
test-zero:
	test -d build/zero || $(PYTHON) -m venv build/zero
	build/zero/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	build/zero/bin/python -m pip install --quiet -c constraints.txt --editable '.[torch]' --group zero
	build/zero/bin/python -m pytest --quiet tests/engine/torch/sharded/test_zero.py $(ARGS)

lint: $(VENV)/lint.$(MODULES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/lint.$(MODULES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/docs.$(MODULES)
	$(BIN)/mkdocs build
	@echo build/docs/index.html

bench: $(VENV)/test.$(MODULES)
	@mkdir -p build/bench
	$(BIN)/adafactor bench --full --json build/bench/steps.json $(ARGS)
	$(BIN)/python benchmarks/torch_memory.py --json build/bench/torch-memory.json

gpu: $(VENV)/test.$(MODULES)
	@mkdir -p build/bench
	$(BIN)/python benchmarks/gpu_static.py --json build/bench/gpu-static.json $(ARGS)
	$(BIN)/python benchmarks/gpu_estimate.py --json build/bench/gpu-estimate.json
	$(BIN)/python benchmarks/host_time.py --json build/bench/host-time.json

paper: $(VENV)/test.$(MODULES)
	@mkdir -p build
	$(BIN)/python experiments/paper.py --plot docs/images/paper.png --json build/paper.json $(ARGS)

# ARGS="tensorflow-cpu==2.19.1 jax==0.7.2": with these.
wheel: | $(BIN)/python
	$(BIN)/python scripts/wheel.py $(ARGS)

sanitize: $(VENV)/lint.$(MODULES)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/sanitize.sh

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache

# A file per set of packages, touched when it is installed; newer requirements install again. The demo's figures are of
# the package as users install it, everything else runs the sources in place: each of the two takes the other's place.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"Python must be 3.11 or later, got {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/demo.$(MODULES): $(SOURCES) $(FILES) | $(BIN)/python
	$(PIP) . --group demo
	@rm -f $(VENV)/*.$(MODULES)
	@touch $@

$(VENV)/test.$(MODULES): $(SOURCES) | $(BIN)/python
	$(PIP) -e '.[keras,tensorflow,jax,torch,convert]' --group test --group stacks
	@rm -f $(VENV)/demo.$(MODULES)
	@touch $@

$(VENV)/docs.$(MODULES): $(VENV)/test.$(MODULES)
	$(PIP) --group docs
	@touch $@

$(VENV)/lint.$(MODULES): $(VENV)/test.$(MODULES)
	$(PIP) --group lint
	@touch $@
