# The same names for people and CI; `make` alone lists them. Needed: make, git and Python 3.11 or later.
#   make train ARGS="-p lr 1e-3"      more words for the command behind a target
#   make test PYTHON=python3.12       another interpreter      (VENV=.venv-312 keeps its environment apart)

VENV ?= .venv
ARGS ?=
# the first interpreter on PATH that is new enough; a shim that answers nothing is passed over
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
BASE := $(VENV)/base.stamp
SERVE := $(VENV)/serve.stamp
DEV := $(VENV)/dev.stamp

# A python3 kernel of the user's own must not stand in for this environment's.
export JUPYTER_PREFER_ENV_PATH = 1
# OpenMP threads that spin while they wait collapse beside a busy neighbour; spinning briefly costs nothing alone (benchmarks/README.md).
QUIET_THREADS := GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000}

.DEFAULT_GOAL := help
.PHONY: help setup train serve test quick cover lint format notebooks fresh lab docs bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(DEV) ## make .venv with everything that tests, lint and docs need
	@echo "ready: make train, make test, make lab; or activate $(BIN) and use papermill, project, pytest"

train: $(BASE) ## train the default model: papermill nbs/train.ipynb, ARGS="-p lr 1e-3" to change it
	@mkdir -p out
	@"$(BIN)/python" .ci/exported.py
	$(QUIET_THREADS) "$(BIN)/papermill" nbs/train.ipynb out/train.ipynb $(ARGS)

# the best finished, whole run of the task goes through the gate first; a smoke test, or no run at all, is no reason to serve
serve: $(SERVE) ## serve the production models at http://127.0.0.1:8000; without one, promote the best run, or train one first
	@mkdir -p out
	@"$(BIN)/python" .ci/exported.py
	@"$(BIN)/project" models show fashion_mnist >/dev/null 2>&1 || { \
		{ "$(BIN)/project" models best fashion_mnist || \
			$(QUIET_THREADS) "$(BIN)/papermill" nbs/train.ipynb out/train.ipynb; } && \
		"$(BIN)/project" promote best --task fashion_mnist --yes; }
	"$(BIN)/project" serve $(ARGS)

# all of them beside each other, a file at a time; what ARGS names runs alone
EVERYTHING := -n logical --maxprocesses 4 --dist loadfile
test: $(DEV) ## run every notebook and every test; ARGS="nbs/core/00_core.ipynb" for one
	@"$(BIN)/python" .ci/exported.py
	"$(BIN)/pytest" $(or $(ARGS),$(EVERYTHING))

quick: $(DEV) ## test what changed since main and what imports it; ARGS=--list says what and why, ARGS="--since REV" since when
	@"$(BIN)/python" .ci/exported.py
	@"$(BIN)/python" .ci/quick.py $(ARGS)

cover: $(DEV) ## the same, with coverage: nine tenths of the package at least
	"$(BIN)/pytest" --cov --cov-report=term-missing:skip-covered $(or $(ARGS),$(EVERYTHING))

# ruff reads notebooks itself; mypy through nbqa adds names, attributes and calls in lessons and runs
lint: $(DEV) ## ruff, types, notebooks' types, workflows
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/nbqa" mypy nbs
	"$(BIN)/actionlint"
	"$(BIN)/zizmor" --offline --quiet .github

format: $(DEV) ## let ruff put notebooks, tests and scripts in order
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

notebooks: $(DEV) ## clean the notebooks, export project/, write README.md
	"$(BIN)/nbdev_clean"
	"$(BIN)/nbdev_export"
	"$(BIN)/python" .ci/readme.py

fresh: $(DEV) ## are the run notebooks' outputs those of this code? ARGS=--run executes and compares, ARGS=--write makes them anew
	$(QUIET_THREADS) "$(BIN)/project" fresh $(ARGS)

lab: $(BASE) ## JupyterLab here, with this environment as the kernel named python3
	@"$(BIN)/python" .ci/exported.py
	$(QUIET_THREADS) "$(BIN)/jupyter-lab" $(ARGS)

docs: $(DEV) ## build the site into _docs/: with Quarto where there is one, else with the stand-in
	"$(BIN)/python" .ci/docs.py

bench: $(BASE) ## time it: ratios against the plain way, never a test; ARGS go to each benchmark
	@for b in $(filter-out benchmarks/planted.py,$(wildcard benchmarks/*.py)); do echo "== $$b"; $(QUIET_THREADS) "$(BIN)/python" "$$b" $(ARGS) || exit 1; done

clean: ## remove what was built; CLEAN_ALL=1 also data/, runs/, out/ and the environment
	rm -rf _proc _docs build dist htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache project.egg-info
	find nbs project tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	$(if $(CLEAN_ALL),rm -rf data runs out wandb "$(VENV)")

# An environment is made anew when its Python is gone, and installed into when settings.ini or setup.py say something new.
$(BASE) $(SERVE) $(DEV): $(VENV)/%.stamp: settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later on PATH: install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" .ci/install.py "$(VENV)" $*
