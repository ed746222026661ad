# make report: everything, from a fresh clone to reports/index.html.   make test: the tests.   make lab: JupyterLab.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export TQDM_MININTERVAL := 5
# DVC and the hub client ask nobody for updates or statistics.
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Idle threads sleep: spinning made a step up to 20 times slower on a busy machine (docs/measurements.md).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: report test lab setup data lint reproducible data-regenerate clean
.DEFAULT_GOAL := report

setup: $(VENV)/.installed ## the environment, from the pinned lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")'
	@echo "== installing into $(VENV) (about 3 minutes)"
	python3 -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -c requirements.lock -e '.[dev]' | grep -E '^(Collecting|Downloading|ERROR|error)' || true
	@$(BIN)/python -c 'import splitlab' || { echo "the installation is incomplete: run '$(BIN)/pip install -c requirements.lock -e .[dev]' to see why"; exit 1; }
	@touch $@

data: setup ## the shipped data and base model
	@echo "== pulling the shipped data and base model"
	dvc pull data.dvc pretrain

report: data ## run the pipeline, then render reports/index.html
	@echo "== training, runs side by side (5 to 10 minutes on 2 cores; interrupt and repeat as you like)"
	dvc stage list --name-only | grep '^train@' | xargs -P "$$(nproc)" -n 1 dvc --wait-for-lock repro --single-item
	@echo "== running the rest of the pipeline (about 20 minutes on 2 cores)"
	dvc repro
	@echo "== rendering the report"
	python -m splitlab.report

test: data ## the whole suite
	python -m pytest --cov=splitlab --cov-report=term:skip-covered --cov-fail-under=90

lab: data ## JupyterLab on the explorer
	jupyter lab --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None notebooks/explore.ipynb

lint: setup ## what pre-commit checks
	ruff check . && ruff format --check . && mypy && nbstripout --keep-id --verify notebooks/*.ipynb

reproducible: data ## run train and attack stages twice and compare every tensor, table and figure
	python benchmarks/reproducibility.py

data-regenerate: setup ## write data/ anew from the seeded generators (provenance; not needed to use the project)
	python -m splitlab.generate data

clean: ## forget caches, and the checkpoints of runs that have not ended; all outputs stay
	rm -rf .cache
