# One command each: `make repro` runs the pipeline, `make serve` schedules it, `make test` the tests, `make check` the linters.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Files of tests at the same time; a process more than there are cores, for some wait (tests/conftest.py orders them).
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What we ship sends nothing home.
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# `dvc` runs each stage's `python`: the one of this environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro plan serve verify-remote test test-fast test-long test-gpu check format picture lock presize-cluster-demo bench-presize bench-seeds bench-orchestration bench-cpu bench-gpu bench-accuracy bench-startup bench-predict bench-scale bench-gate bench-duplicates bench-suspects clean

repro: $(READY)
	dvc repro
	@python -c "import pandas; print('\n', pandas.read_json('metrics/evaluate.json')[['test', 'valid']].dropna().map('{:.4g}'.format).to_string(), '\n', sep='')"
	@echo "Look at reports/index.html: all that was found, as one page."
	@echo "The model is in models/. For your own images: cp presets/photos.yaml params.yaml (see README.md)."

# What `dvc repro` would do, stage by stage, and why.
plan: $(READY)
	@breedline plan

# The deployments of prefect.yaml on this machine, with a Prefect server where none is configured, until Ctrl-C.
serve: $(READY)
	@breedline serve

# What the DVC remote lacks of what dvc.lock names; sent again from the cache.
verify-remote: $(READY)
	@breedline verify-remote $(if $(DEEP),--deep)

test: $(READY)
	python -m pytest $(SIDE_BY_SIDE)

test-fast: $(READY)
	python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# The campaigns of docs/reliability.md whole, of which `make test` does a short form: many hours.
test-long: $(READY)
	BREEDLINE_TEST_LONG=1 python -m pytest -m long --timeout 3600

check: $(READY)
	ruff check
	ruff format --check
	mypy
	lint-imports --no-cache

# The tests that need a CUDA GPU, on the first one.
test-gpu: $(READY)
	TEST_GPU=0 python -m pytest -m gpu

# docs/pipeline.svg, from dvc.yaml.
picture: $(READY)
	python docs/draw_pipeline.py

format: $(READY)
	ruff check --fix
	ruff format

# Resolve pyproject.toml anew into the exact environment, hashes and all, and the part of it that a published model needs;
# and list the architectures that it knows.
lock: EXACTLY := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --upgrade --quiet
lock: $(BIN)/uv
	uv pip compile pyproject.toml --extra dev $(EXACTLY) -o requirements.txt
	uv pip compile pyproject.toml --extra build --constraint requirements.txt $(EXACTLY) -o requirements-predict.txt
	$(MAKE) $(READY)
	python -c "from breedline.zoo import known_architectures as known; print('name,weights,url', *map(','.join, known()), sep='\n')" > breedline/architectures.csv

# A Dask scheduler and its workers on this machine, some of which are killed.
presize-cluster-demo: $(READY)
	python -m benchmarks.cluster $(if $(SOURCE),--source $(SOURCE))

bench-presize: $(READY)
	python -m benchmarks.presize

# SOURCE=an archive of photos, rather than images made of noise.
bench-duplicates: $(READY)
	python -m benchmarks.duplicates $(if $(SOURCE),--source $(SOURCE))

# SEEDS=how many.
bench-seeds: $(READY)
	dvc repro presize weights
	python -m benchmarks.seeds $(if $(SEEDS),--seeds $(SEEDS))

bench-orchestration: $(READY)
	python -m benchmarks.orchestration

# SOURCE=an archive of photos, rather than images made of noise.
bench-cpu: $(READY)
	CUDA_VISIBLE_DEVICES= python -m benchmarks.training $(if $(SOURCE),--source $(SOURCE))

bench-gpu: $(READY)
	python -m benchmarks.training --switches $(if $(SOURCE),--source $(SOURCE))

# SOURCE=the pets, PHOTOS=photos in a folder for each class; OUT=a table that keeps the results, so that it can go on.
bench-accuracy: $(READY)
	python -m benchmarks.accuracy $(if $(SOURCE),--source $(SOURCE)) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(OUT),--out $(OUT))

# AGAINST=a checkout of another version.
bench-startup: $(READY)
	python -m benchmarks.startup $(if $(AGAINST),--against $(AGAINST))

# The model in models/ on photos of SOURCE; beside fastai on the images that it was trained on.
bench-predict: $(READY)
	python -m benchmarks.predict $(if $(SOURCE),--source $(SOURCE)) --fastai data/presized data/labels.csv params.yaml

# IMAGES=the sizes, SOURCE=an archive of photos.
bench-scale: $(READY)
	python -m benchmarks.scale $(if $(SOURCE),--source $(SOURCE)) $(if $(IMAGES),--images $(IMAGES))

# How often the gate is wrong, simulated.
bench-gate: $(READY)
	python -m benchmarks.gate

# SOURCE=the pets; TABLES="--labels=NOISY --truth=TRUE" about the images of data/presized.
bench-suspects: $(READY)
	python -m benchmarks.suspects $(if $(SOURCE),--source $(SOURCE)) $(TABLES)

clean:
	rm -rf $(VENV)

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Breedline needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8

$(READY): $(BIN)/uv requirements.txt pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
