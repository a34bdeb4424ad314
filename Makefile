# What a developer and CI run. Needs make, Python 3.11 (or 3.12, 3.13) and a package index; uv is used when it is
# on PATH. Everything is installed into .venv from requirements.lock, which pins every package by its hash.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3.11)
UV := $(shell command -v uv)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
EXTRAS := --extra dev --extra embedded --extra otel --extra plot
COMPILE := uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --python-version 3.11

PYTEST_ARGS ?=
BENCH_ARGS ?=
CALIBRATE_ARGS ?=
SCENARIO_ARGS ?=
CHAOS_ARGS ?=
FUZZ_ARGS ?=
SIMULATE_ARGS ?= --schedules 20000

# Tests start some hundred interpreters; without bytecode each of them compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup compiled demo test test-pure test-broker lint format bench calibrate scenarios error-rates chaos chaos-short fuzz simulate audit lock clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the locked packages and stream-xp in it

# A stamp, so that set-up happens once, and again when the lock or the project file changes.
$(STAMP): pyproject.toml requirements.lock
ifneq ($(UV),)
	test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV)
	uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	uv pip install --quiet --python $(BIN)/python --no-deps --editable .
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
endif
	touch $@

# Once before all tests, so that no two processes compile the same kernels at the same time.
compiled: $(COMPILED)

$(COMPILED): $(STAMP) stream_xp/engine/kernels.py stream_xp/engine/warm_up.py
	$(BIN)/python -c "from stream_xp.engine.warm_up import warm_up; warm_up()"
	touch $@

demo: $(STAMP) ## Watch an experiment be stopped, on an embedded broker
	$(BIN)/stream-xp demo

# What needs no broker runs on all cores; what talks to a broker mostly waits, and runs one after the other. With
# `make -j2 -O test`, as CI does, both run at once, and what only computes yields to what has deadlines. Exit code 5 says
# that PYTEST_ARGS chose nothing.
test: test-pure test-broker ## Run the tests; the last lines say which broker they ran on (PYTEST_ARGS="-k name")

test-pure: $(COMPILED)
	OPENBLAS_NUM_THREADS=1 nice -n 5 $(BIN)/pytest -n auto --dist worksteal -m "not broker" $(PYTEST_ARGS) || \
	{ code=$$?; test $$code = $(if $(PYTEST_ARGS),5,never) || exit $$code; }

test-broker: $(COMPILED)
	$(BIN)/pytest tests/broker tests/deploy -m broker $(PYTEST_ARGS) || { code=$$?; test $$code = $(if $(PYTEST_ARGS),5,never) || exit $$code; }

lint: $(STAMP) ## Check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure ingest (BENCH_ARGS="--events 1000000")
	$(BIN)/stream-xp bench ingest $(BENCH_ARGS)

calibrate: $(STAMP) ## Measure the error rate of every method and write docs/calibration.md (CALIBRATE_ARGS="--quick")
	$(BIN)/stream-xp calibrate $(CALIBRATE_ARGS)

scenarios: $(STAMP) ## Run whole experiments with a known truth and write docs/scenarios.md (SCENARIO_ARGS="--seed 2")
	OPENBLAS_NUM_THREADS=1 $(BIN)/stream-xp simulate examples/scenarios/*.yaml --runs 500 --write docs/scenarios.md $(SCENARIO_ARGS)

error-rates: $(COMPILED) ## Draw all runs of the simulated error rates, of which `make test` draws a part
	OPENBLAS_NUM_THREADS=1 STREAM_XP_TEST_ERROR_RATES=full $(BIN)/pytest -n auto --dist worksteal tests/simulation/test_*.py tests/unit/engine/test_monitors.py

chaos: $(STAMP) ## Inject every fault of docs/guarantees.md on an Apache Kafka; most of an hour (CHAOS_ARGS="-k zombie")
	$(BIN)/python -m tests.chaos full $(CHAOS_ARGS)

chaos-short: $(COMPILED) ## The faults that stand for the others; under five minutes, part of CI
	$(BIN)/python -m tests.chaos short $(CHAOS_ARGS)

fuzz: $(STAMP) ## Put a million mutated records through every decoder (FUZZ_ARGS="--seed 2")
	$(BIN)/python -m tests.fuzz --records 1000000 $(FUZZ_ARGS)

simulate: $(STAMP) ## Run seeded schedules of a whole cluster (SIMULATE_ARGS=...)
	$(BIN)/python -m tests.simulation.cluster $(SIMULATE_ARGS)

audit: ## Compare the locked packages with the known vulnerabilities (needs the advisory service of the index)
	$(PYTHON) .ci/audit

lock: ## Resolve the dependencies again and write the locks (needs uv)
	$(COMPILE) --upgrade $(EXTRAS) --output-file requirements.lock pyproject.toml
	$(COMPILE) --upgrade --extra otel --output-file deploy/requirements.lock pyproject.toml

clean: ## Remove .venv, caches and build output
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find stream_xp tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
