# make report: everything, from a fresh clone to reports/index.html.   make test: the tests.   make lab: JupyterLab.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TQDM_MININTERVAL := 5
export PYTHONUTF8 := 1
# DVC and the hub client ask nobody for updates or statistics.
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# Idle threads sleep: threads that spin while they wait slow training down many times over on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
# Jupyter, matplotlib, DVC and the hub client write to the home; where that is not possible, to one in the checkout.
ifneq ($(shell for d in "$${HOME-}" "$${HOME-}"/.{cache,config,local,local/share,jupyter,ipython}; do \
	[ -w "$$d" ] || { [ "$$d" != "$${HOME-}" ] && [ ! -e "$$d" ]; } || echo "$$d"; done; mkdir -p .cache/home 2> /dev/null),)
export HOME := $(CURDIR)/.cache/home
endif
# The scripts of an environment name its place: in a folder that was moved, they are made anew.
MOVED := $(shell [ -s $(VENV)/.installed ] && [ "$$(< $(VENV)/.installed)" != "$$(pwd -P)" ] && echo --clear)

.PHONY: report pipeline test lab setup data lint reproducible data-regenerate clean FORCE
.DEFAULT_GOAL := report

setup: ## the environment, from the pinned lock
	@python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")'
	@python3 pipeline/checkout.py room 0
	@flock -n .cache/setup.lock true || echo "== waiting for another set-up of this folder"
	@flock .cache/setup.lock $(MAKE) -s $(VENV)/.installed
	@mkdir -p $(VENV)/etc/jupyter && ln -sfn ../../../pipeline/jupyter_server_config.py $(VENV)/etc/jupyter/
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@ln -sfn ../../../../../pipeline/jupyter_overrides.json $(VENV)/share/jupyter/lab/settings/overrides.json

$(VENV)/.installed: requirements.lock pyproject.toml $(if $(MOVED),FORCE)
	@python3 pipeline/checkout.py room 5
	@echo "== installing into $(VENV) (about 3 minutes)"
	python3 -m venv $(MOVED) $(VENV)
	@# What pip complains of goes to stderr, and comes through as its status does; of the rest a line per package is shown.
	python -m pip install --disable-pip-version-check --progress-bar off -c requirements.lock -e '.[dev]' \
		| { grep --line-buffered -E '^(Collecting|Downloading)' || true; }
	@python -c 'import splitlab'
	@pwd -P > $@

data: setup ## the shipped data and base model
	@python pipeline/checkout.py files
	@# A download without git: DVC has to be told so, in a file of this checkout alone.
	@if [ ! -e .git ]; then dvc config -q --local core.no_scm true; \
		elif grep -qs no_scm .dvc/config.local; then dvc config -q --local --unset core.no_scm; fi
	@echo "== pulling the shipped data and base model"
	dvc pull data.dvc pretrain

report: setup ## run the pipeline, then render reports/index.html
	@python pipeline/checkout.py room 2
	@flock -n -E 99 .cache/report.lock $(MAKE) --no-print-directory pipeline || { [ $$? -ne 99 ] || \
		echo "error: another 'make report' is at work in this folder; wait until it has ended" >&2; exit 1; }

pipeline: data
	@echo "== running the pipeline (about 30 minutes on 2 cores; interrupt and repeat as you like)"
	dvc repro
	@echo "== rendering the report"
	splitlab report

test: data ## the whole suite, in two processes, with files that take long first
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--cov=splitlab --cov-report=term:skip-covered --cov-fail-under=95

lab: data ## JupyterLab on the explorer
	splitlab explore

lint: setup ## what pre-commit checks
	ruff check . && ruff format --check . && lint-imports --no-logo && mypy && nbstripout --keep-id --verify notebooks/*.ipynb

reproducible: data ## run record and attack stages twice and compare every tensor, table and figure
	python benchmarks/reproducibility.py

data-regenerate: setup ## write data/ anew from the seeded generators (provenance; not needed to use the project)
	python -m splitlab.data.generate data

clean: ## forget caches, and the checkpoints of runs that have not ended; all outputs stay
	rm -rf .cache
