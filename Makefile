# One command each: `make repro` runs the pipeline, `make test` the tests, `make check` the linters.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# What we ship sends nothing home.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# `dvc` runs each stage's `python`: the one of this environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test test-fast check format lock bench-presize clean

repro: $(READY)
	dvc repro
	@python -c "import pandas; print('\n', pandas.read_json('metrics/evaluate.json').map('{:.4g}'.format).to_string(), '\n', sep='')"
	@echo "Look at reports/evaluate/top_losses.png, reports/evaluate/confused.csv and 'dvc plots show'."
	@echo "The model is in models/; your own images are a change of params.yaml (see README.md)."

test: $(READY)
	python -m pytest

test-fast: $(READY)
	python -m pytest -m "not slow"

check: $(READY)
	ruff check
	ruff format --check
	mypy
	lint-imports --no-cache

format: $(READY)
	ruff check --fix
	ruff format

# Resolve pyproject.toml anew into the exact environment, hashes and all.
lock: $(BIN)/uv
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --upgrade --quiet -o requirements.txt

bench-presize: $(READY)
	python -m benchmarks.presize

clean:
	rm -rf $(VENV)

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Breedline needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8

$(READY): $(BIN)/uv requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	@touch $@
