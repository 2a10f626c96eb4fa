# Two commands are enough on a fresh clone: `make demo` and `make test`. Everything lands in .venv and the user's cache.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

DEMO_LIMIT  ?= 8
DEMO_TOKENS ?= 32

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## measure vanilla and spd on a few prompts, and compare them
	@$(BIN)/python -m spdbench.models.embedded
	@$(BIN)/spdbench run quick -b vanilla -b spd -o spd.stages=3 --drafter oracle:0.8 \
	  --limit $(DEMO_LIMIT) --max-new-tokens $(DEMO_TOKENS)

test: $(VENV)/.installed-dev  ## install what tests need, then check everything
	@$(BIN)/python -m spdbench.models.embedded
	@$(MAKE) --no-print-directory check

check: lint  ## format, lint, types, tests
	@$(BIN)/python -m pytest -q

lint:
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make format'."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

format:  ## format the code and mend what can be mended
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:  ## remove the environment and what tools left; the model cache stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "spdbench needs Python 3.11 or later; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: pip then takes a CPU build that lies at hand, where there is one.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing spdbench ..."
	@$(PIP) install -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests need ..."
	@$(PIP) install -c constraints.txt -e '.[dev,hub,humaneval,eval]'
	@touch $@
