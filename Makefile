# `make demo` and `make test` are the whole set-up on a fresh machine: both create .venv by themselves.
PYTHON ?= python3
# The torch to install first: its CPU or CUDA build decides what everything else is built against.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FAMILY ?= gla
SEEDS ?= 1
# Processes that run tests; each may start up to four ranks.
JOBS ?= 2

# DeepSpeed compiles operators on first use and locks a shared cache: one cache per environment avoids the race.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.PHONY: setup demo test test-all lint format bench clean

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 15) else "Python 3.11 to 3.14 is needed; set PYTHON=... (found " + sys.version.split()[0] + ")")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@# --no-deps: it asks for torchvision, which breaks transformers beside a CPU torch, and for transformers 4.
	$(BIN)/python -m pip install --quiet --no-deps "mosaicml-streaming==0.13.0"
	@# mamba_ssm's Triton kernels. Without its compiled parts, which nothing here uses, and without what those need.
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
		"mamba-ssm==2.3.2.post1"
	@# Version 0.1.0 left an import hook here, whose module is gone.
	@rm -f $(VENV)/lib/python3*/site-packages/statex_streaming.pth
	@touch $(READY)

demo: $(READY)
	$(BIN)/statex demo --out demo --family $(FAMILY) --seeds $(SEEDS) --overwrite

test: $(READY) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" --durations 15

test-all: $(READY) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/check_wording.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.cpu_scan
	$(BIN)/python -m benchmarks.cpu_features
	$(BIN)/python -m benchmarks.expand
	$(BIN)/python -m benchmarks.reshard
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.serving

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
