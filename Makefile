# make demo and make test do all set-up themselves, in .venv; nothing outside this folder is changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check clean

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# make test WHOLE=1 takes in the tests that start servers and sites as processes: most of the time of them all. It does
# not measure which lines are reached: that takes half as long again, and the others reach them.
WHOLE ?=
# To use a Python that is not on the PATH: make test PYTHON=/path/to/python3.11
PYTHON ?=

help: ## Show this.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-to-run ## Do the embedded example job from its beginning, in runs/demo.
	@rm -rf runs/demo
	@$(BIN)/consilience simulate --out runs/demo

# One thread a worker: the workers share the machine. pytest's closing line is the last one.
test: $(VENV)/.ready-to-test ## Run the tests and measure the lines they reach; with WHOLE=1 also those of real processes, unmeasured.
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		$(if $(WHOLE),,-m "not slow" --cov --cov-report=term:skip-covered --cov-fail-under=90)

check: $(VENV)/.ready-to-test ## Check style, types and the rules of import.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

clean: ## Remove the environment, caches, builds and the demo's run. Other runs stay.
	rm -rf $(VENV) runs/demo build dist src/consilience.egg-info .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than pyproject.toml as long as what it asks for is installed. Sources are installed in place.
$(VENV)/.ready-to-run: pyproject.toml | $(VENV)/.created
	@echo "Installing consilience into $(VENV); the first time this takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.ready-to-test: pyproject.toml | $(VENV)/.created
	@echo "Installing consilience and its test tools into $(VENV); the first time this takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[all,test]"
	@touch $(VENV)/.ready-to-run $@

# A name on the PATH may be a launcher that starts nothing, so every candidate is run before it is believed.
$(VENV)/.created:
	@if $(BIN)/python -c 'import pip' 2>/dev/null; then touch $@; exit; fi; \
	bare=; \
	for name in $(or $(PYTHON),python3.11 python3.12 python3); do \
		for python in $$(type -aP "$$name" || true); do \
			"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue; \
			if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then bare="$${bare:-$$python}"; continue; fi; \
			echo "Making $(VENV) with $$python"; \
			rm -rf $(VENV); "$$python" -m venv $(VENV); touch $@; exit; \
		done; \
	done; \
	if [ -n "$$bare" ]; then \
		version=$$("$$bare" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
		echo "$$bare cannot make environments: install the package $$version-venv, then run make again" >&2; \
	else \
		echo "No Python 3.11 or 3.12 found: install one, or name it with make PYTHON=/path/to/python" >&2; \
	fi; \
	exit 1
