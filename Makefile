# `make help` says what there is. Needs Python 3.11 or later and a package index, nothing else.

PYTHON ?= python3
VENV ?= .venv
LIMIT ?= 20
MAX_NEW_TOKENS ?= 32

# One test process a core, each with one thread. The tests marked `whole_machine` measure processor time or need all
# threads, so they run afterwards and alone, from the files that name the mark: it takes longer to collect all tests
# than to run these. Files stay whole (`loadfile`), so that their models are built once, and in order, in which the long
# ones (cli, conformance, processes) come before the many short ones of tests/unit.
TEST_WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
IN_PARALLEL := --numprocesses $(TEST_WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not whole_machine"

RUN := $(VENV)/bin/python -m
DEMO := vanilla spd eagle medusa ngram
INSTALL := $(RUN) pip install --quiet --constraint constraints.txt
# Drafts are right or wrong by a hash, and trees are named, so that no machine's times or rounding change a step.
GATE_RUN := run quick --dtype float32 --drafter oracle:0.8 --limit 4 --max-new-tokens 20 --devices cpu \
	-b vanilla -b spd -b ppsd -b eagle -b medusa -b ngram \
	-o ppsd.executor=inline -o eagle.tree=static -o medusa.tree=chain
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check gate baselines docs format clean

help:
	@echo "make demo     measure every method on the embedded model, compare them, draw results/report.html"
	@echo "              (LIMIT=$(LIMIT) conversations, MAX_NEW_TOKENS=$(MAX_NEW_TOKENS) each)"
	@echo "make test     install what the tests need, fetch the embedded model, and run all checks"
	@echo "make check    formatting, lint, types, tests and gate, in what is installed already"
	@echo "              (TEST_WORKERS=$(TEST_WORKERS) test processes at once)"
	@echo "make gate     a small run of every method, which has to give results/baselines to the token"
	@echo "make baselines  renew results/baselines, when a change of ids or steps is meant"
	@echo "make docs     build the documentation as pages, in build/site"
	@echo "make format   format the code"
	@echo "make clean    remove $(VENV), build folders and caches; results stay"
	@echo "PYTHON=$(PYTHON) makes $(VENV), once."

demo: $(VENV)/.installed
	@echo "Measuring every method with its trained drafter: $(LIMIT) conversations, $(MAX_NEW_TOKENS) tokens each ..."
	@$(RUN) spdbench run quick $(DEMO:%=-b %) --limit $(LIMIT) --max-new-tokens $(MAX_NEW_TOKENS) \
		--trace --keep-drafts
	@if $(RUN) spdbench report $(DEMO:%=results/quick__%__smollm2.json) -o results/report.html --force; \
		then echo "Open results/report.html in a browser: the same comparison with charts and answers."; \
		else echo "The comparison above is complete; the page results/report.html could not be written."; fi

test: $(VENV)/.installed-for-tests
	@echo "Making the embedded model ready ..."
	@$(RUN) spdbench.models
	@$(MAKE) --no-print-directory check

check:
	@echo "Checking the format ..."
	@$(RUN) ruff format --check --quiet .
	@echo "Linting ..."
	@$(RUN) ruff check --quiet .
	@echo "Checking types ..."
	@$(RUN) mypy
	@echo "Testing on $(TEST_WORKERS) cores ..."
	@OMP_NUM_THREADS=1 $(RUN) pytest $(IN_PARALLEL)
	@echo "Testing what needs the whole machine ..."
	@$(RUN) pytest -m whole_machine `grep -rl --include='test_*.py' whole_machine tests`
	@$(MAKE) --no-print-directory gate

gate:
	@echo "Running every method against results/baselines ..."
	@new=`mktemp -d` && trap 'rm -rf "$$new"' EXIT && \
		$(RUN) spdbench $(GATE_RUN) --results "$$new" >"$$new/table" && \
		$(RUN) spdbench check "$$new" --baseline results/baselines --gate exact

baselines:
	@$(RUN) spdbench $(GATE_RUN) --results results/baselines

docs: $(VENV)/.installed
	@$(INSTALL) --editable '.[docs]'
	@$(RUN) docs.module_map
	@$(RUN) docs.option_reference
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict
	@echo "Open build/site/index.html in a browser. The search works only where the pages are served:"
	@echo "$(RUN) http.server --directory build/site, then http://127.0.0.1:8000"

format:
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find spdbench backends suites tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed is noted in a file that is older than these two as soon as one of them changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing torch, the biggest part (minutes) ..."
	@$(INSTALL) torch
	@echo "Installing spdbench and the rest ..."
	@$(INSTALL) --editable '.[report]'
	@touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(INSTALL) --editable '.[dev,hub,humaneval,eval,report,pandas]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spdbench needs Python 3.11 or later, and $(PYTHON) is `$(PYTHON) -V`; say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Making $(VENV) with `$(PYTHON) -V` ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }
