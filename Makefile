# Two commands from a fresh clone: `make demo` and `make test`. Needed: Python >= 3.10, git, make, pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_OUTPUT := demo-output.jsonl

.PHONY: help setup demo test lint types format sanitize builtin clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP)  ## create .venv, install el4ner and the embedded models

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"Python {v[0]}.{v[1]} found; el4ner needs 3.10 or newer: make PYTHON=python3.12")'
	@# Some systems ship Python without ensurepip: then the system's own pip installs pip into the environment.
	$(PYTHON) -m venv .venv || { \
	  rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install pip; } || { \
	  rm -rf .venv; exit 1; }

# Anything that changes what is installed or compiled renews the stamp; edits of .py files need no install.
$(STAMP): pyproject.toml setup.py constraints.txt el4ner/_native.pyi $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,bench,dev]'
	@$(BIN)/python -c 'import el4ner._native' || \
	  echo 'WARNING: no compiler built el4ner._native; Numba kernels are used. `el4ner doctor` says more.' >&2
	$(BIN)/el4ner download embedded
	@touch $@

demo: setup  ## find entities in examples/ with the embedded models
	$(BIN)/el4ner predict examples/*.jsonl -o $(DEMO_OUTPUT)
	$(BIN)/el4ner show $(DEMO_OUTPUT)

test: lint types  ## lint, types and all tests
	@# The installed command, not `python -m pytest`: that would put the top folder `kernels` on the import path.
	@# A worker for every core, each with one thread; a file's tests stay in one worker, with what they share.
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not know that kernels/ is el4ner.kernels and bench/ el4ner.bench: show it the installed layout.
types: setup  ## mypy, strict
	@rm -rf build/types && mkdir -p build/types/el4ner
	@ln -s $(CURDIR)/el4ner/* $(CURDIR)/kernels $(CURDIR)/bench build/types/el4ner/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p el4ner

# -O1 with all instruction sets: sanitizers see the same loads and stores as the installed module makes.
SANITIZE := -std=c++17 -O1 -g -ffp-contract=off -fno-strict-aliasing -fno-omit-frame-pointer -Wall -Wextra -pthread \
  -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize:  ## address, undefined-behaviour and thread sanitizers over the C++ kernels
	@mkdir -p build
	$(CXX) $(SANITIZE) -Icsrc csrc/sanitize.cpp -o build/sanitize
	build/sanitize
	$(CXX) $(SANITIZE) -Icsrc csrc/sanitize_span_topk.cpp -o build/sanitize_span_topk
	build/sanitize_span_topk
	@# Threads of span_topk share what they write to: data races, in a build of its own, since the two do not mix.
	$(CXX) $(filter-out -fsanitize=%,$(SANITIZE)) -fsanitize=thread -Icsrc csrc/sanitize_span_topk.cpp -o build/sanitize_threads
	build/sanitize_threads

builtin: setup  ## fit the built-in pool anew and write el4ner/data/builtin.npz (minutes)
	@# Not from here: `python -m` would put the top folder `kernels` on the import path.
	cd el4ner/data && $(CURDIR)/$(BIN)/python -m el4ner.shipped

clean:  ## remove everything that was made
	rm -rf .venv build dist el4ner.egg-info el4ner/_native*.so $(DEMO_OUTPUT)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
