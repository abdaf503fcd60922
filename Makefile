# Every target does its own set-up in a local virtual environment. Python 3.10 or later is enough;
# only the MySQL driver wants a C compiler and headers, and everything else works without it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_READY = $(VENV)/.demo-installed
TOOLS_READY = $(VENV)/.tools-installed
BENCH_READY = $(VENV)/.bench-installed
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

# make test DBS=postgresql runs one database; PYTEST_ARGS="-k name" some tests.
DBS ?=
# make bench BENCH_ARGS="--quick --only latency"
BENCH_ARGS ?=
# make test-matrix PYTHONS="3.11 3.12"
PYTHONS ?= 3.10 3.13
MATRIX_DBS ?= sqlite postgresql

.PHONY: help demo test torture mutations bench test-matrix lint typecheck format clean mysqlclient
.DELETE_ON_ERROR:

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1@\2/p' $(MAKEFILE_LIST) | \
		while IFS=@ read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

demo: $(DEMO_READY) ## Run the example: web site, two workers, two beats (DEMO_SECONDS=20 ends it)
	@$(BIN)/python -m example_project.demo

test: $(TOOLS_READY) mysqlclient ## Run the suite on SQLite, PostgreSQL, MariaDB and PgBouncer
	@$(BIN)/python tests/run.py $(DBS:%=--db %)

torture: $(TOOLS_READY) mysqlclient ## Run the hard tests on durable servers (DISTLOCK_TORTURE=ci, short, long)
	@$(BIN)/python tests/run.py --torture $(DBS:%=--db %)

mutations: $(TOOLS_READY) mysqlclient ## Break each safety line, and see a test fail (two hours; DBS=postgresql: one)
	@$(BIN)/python -m tests.torture.mutations $(DBS:%=--db %)

bench: $(BENCH_READY) mysqlclient ## Measure beside the peers, on private servers (BENCH_ARGS=--quick: a quarter of an hour)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

test-matrix: ## Run the suite on other Pythons (PYTHONS="3.10 3.13"), each with its newest Django
	@failed=; for version in $(PYTHONS); do \
		python=; \
		for found in "python$$version" "$$HOME/.pyenv/versions/$$version".*/bin/python; do \
			if "$$found" -c '' 2>/dev/null; then python=$$found; break; fi; \
		done; \
		echo "===== Python $$version: $${python:-not found}"; \
		if [ -z "$$python" ]; then failed="$$failed $$version"; continue; fi; \
		$(MAKE) test VENV=.venv-$$version PYTHON="$$python" DBS="$(MATRIX_DBS)" \
			|| failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed or not found:$$failed"; exit 1; fi

lint: $(TOOLS_READY) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck: $(TOOLS_READY) ## Check types only
	$(BIN)/mypy

format: $(TOOLS_READY) ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove results, caches and builds; virtual environments stay
	rm -rf .test-results .demo .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache build dist
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last when an environment is made, so its presence means a whole one.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) \
		and "Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(DEMO_READY): setup.cfg pyproject.toml | $(BIN)/pip
	$(PIP) install --editable '.[demo]'
	@touch $@

$(TOOLS_READY): $(DEMO_READY)
	$(PIP) install --editable '.[tools]'
	@touch $@

$(BENCH_READY): $(TOOLS_READY)
	$(PIP) install --editable '.[bench]'
	@touch $@

# Not a stamp: where the build failed, it is tried again, in case the headers have come since.
mysqlclient: $(TOOLS_READY)
	@$(BIN)/python -c 'import MySQLdb' 2>$(VENV)/mysqlclient.log \
		|| $(PIP) install --editable '.[mysql]' >$(VENV)/mysqlclient.log 2>&1 \
		|| echo "mysqlclient could not be installed, see $(VENV)/mysqlclient.log"
