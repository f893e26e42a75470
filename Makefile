# `make` alone lists the targets.

PYTHON ?= python3
# The tests take less than ten minutes on two processors; this ends a run that hangs.
TEST_SECONDS ?= 900
APT = sudo apt-get install -y python3 python3-venv make

# Four workers and hundreds of servers would compile the program again and again.
unexport PYTHONDONTWRITEBYTECODE

BIN = .venv/bin
DEPENDENCIES = .venv/.dependencies
INSTALLED = .venv/.installed
CLIENTS = .cache/clients/.installed
CLIENT_LISTS = $(wildcard tests/clients/*.in)
ABLY = .cache/clients/ably/.installed
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' $(UPGRADE)

.PHONY: help install run test check bench faults lock clients image clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## Make .venv with the locked packages and this project in it

$(DEPENDENCIES): requirements-dev.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "kachery-lab needs Python 3.11 to 3.13 with venv; $(PYTHON) is not that. On Debian or Ubuntu:" >&2; \
		echo "  $(APT)" >&2; \
		echo "or name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(INSTALLED): $(DEPENDENCIES) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: $(INSTALLED) ## Start a server; settings come from the environment
	@exec $(BIN)/kachery-lab start

test: $(INSTALLED) $(CLIENTS) ## Run the tests, all but the slow ones
	$(BIN)/python -m pytest -m 'not slow' -n 4 --dist loadfile --no-loadscope-reorder --session-timeout=$(TEST_SECONDS)

faults: $(INSTALLED) $(CLIENTS) ## Run the slow tests: kills, power cuts, full and failing disks
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED) ## Check format, lint, types, layers and migrations
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m kachery_lab.db.migrate --check

bench: $(INSTALLED) $(CLIENTS) ## Measure
	$(BIN)/python -m tests.bench

clients: $(CLIENTS) $(ABLY) ## Install the published clients, for tests against them; the second needs npm

$(CLIENTS): $(DEPENDENCIES) tests/clients/environment.py $(CLIENT_LISTS:.in=.lock)
	$(BIN)/python -m tests.clients.environment
	@touch $@

$(ABLY): $(DEPENDENCIES) tests/clients/ably/environment.py tests/clients/ably/package-lock.json
	$(BIN)/python -m tests.clients.ably.environment

image: ## Build the container image kachery-lab:local
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) -t kachery-lab:local .

lock: $(DEPENDENCIES) ## Write the lock files anew; UPGRADE=--upgrade takes newer versions
	$(COMPILE) pyproject.toml -o requirements.lock
	$(COMPILE) -c requirements.lock --group dev pyproject.toml -o requirements-dev.lock
	$(COMPILE) -c requirements-dev.lock --group build -o requirements-build.lock
	set -e; for list in $(CLIENT_LISTS:.in=); do $(COMPILE) $$list.in -o $$list.lock; done
	cd tests/clients/ably && npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved --silent

clean: ## Remove everything that make made
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
