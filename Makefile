# Each target works on a fresh machine: it makes .venv, installs the tested versions, then does its work.
# Stamps keep repeated calls from installing again; they are older than pyproject.toml or the constraints when those change.

PYTHON ?= python3
VENV ?= .venv
VENV_OPENAI2 ?= .venv-openai2
VENV_FRAMEWORKS ?= .venv-frameworks
VENV_AGENTS ?= .venv-agents
VENV_AIDER ?= .venv-aider
ARGS ?=
DATA ?=
# Processes the tests share out among themselves, a file at a time.
WORKERS ?= 2
# Extra arguments for the one installation of torch, e.g. an index that serves CPU-only wheels.
TORCH_PIP_ARGS ?=

BIN := $(VENV)/bin
# Nothing is compiled to bytecode on installing: a start imports a tenth of the 17,000 files there are.
PIP_INSTALL := -m pip --disable-pip-version-check -qq install --no-compile
# That tenth is compiled at once, as pip would have, also where Python is told to write no bytecode: a start takes a third.
STARTS := import genai_prices.data, proxy.commands.serve, proxy.upkeep.loading
CONSTRAINTS := deploy/constraints.txt
PIP := $(BIN)/python $(PIP_INSTALL) -c $(CONSTRAINTS)
MODEL := $(VENV)/share/ibid/smollm2.gguf
CONVERTED := $(VENV)/share/ibid/converted
RUN_STAMP := $(VENV)/.ibid-run
DEV_STAMP := $(VENV)/.ibid-dev
OPENAI2_STAMP := $(VENV_OPENAI2)/.ibid-openai2
FRAMEWORKS_STAMP := $(VENV_FRAMEWORKS)/.ibid-frameworks
AGENTS_STAMP := $(VENV_AGENTS)/.ibid-agents
AIDER_STAMP := $(VENV_AIDER)/.ibid-aider
NODE_STAMP := tests/conformance/node_modules/.ibid-node

export IBID_TEST_LLM := $(abspath $(MODEL))
export IBID_TEST_MODELS := $(abspath $(CONVERTED))
export IBID_OPENAI2_PYTHON := $(abspath $(VENV_OPENAI2)/bin/python)
export IBID_FRAMEWORKS_PYTHON := $(abspath $(VENV_FRAMEWORKS)/bin/python)
export IBID_AGENTS_PYTHON := $(abspath $(VENV_AGENTS)/bin/python)
export IBID_AIDER_PYTHON := $(abspath $(VENV_AIDER)/bin/python)
export IBID_SCHEMATHESIS := $(abspath $(VENV_FRAMEWORKS)/bin/st)
unexport PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve demo test test-loaded lint docs conformance bench real-life train-guard clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(RUN_STAMP) ## start ibid on 127.0.0.1:4141 with SQLite and the bundled model (ARGS="--upstream URL …")
	@exec $(BIN)/ibid serve $(ARGS)

demo: $(DEV_STAMP) $(MODEL) ## a real local LLM behind ibid: miss, repeat, paraphrase, look-alikes; then keeps running
	@exec $(BIN)/python -m deploy.demo --model $(MODEL) $(ARGS)

# Installs, lint and downloads side by side, each with its output in one piece; whatever fails stops the rest.
test: ## everything CI runs: lint, then all tests
	@$(MAKE) --no-print-directory -j 3 $(filter --output-sync,$(.FEATURES:%=--%)) \
		lint $(MODEL) $(CONVERTED)/.done $(OPENAI2_STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-loaded: $(DEV_STAMP) ## the tests beside four busy loops, as on a machine that others use too
	@$(MAKE) --no-print-directory $(MODEL) $(CONVERTED)/.done $(OPENAI2_STAMP)
	$(BIN)/python -m tests.loaded $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV_STAMP) ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV_STAMP) ## write into deploy/docs what the code knows: settings, reasons, commands, tables, metrics
	$(BIN)/python -m deploy.pages

# Needs node and npm, from version 20 on; on Linux a newer node for the clients that want it comes from npm.
CLIENTS := $(OPENAI2_STAMP) $(FRAMEWORKS_STAMP) $(AGENTS_STAMP) $(AIDER_STAMP) $(NODE_STAMP)
conformance: $(DEV_STAMP) $(MODEL) $(CONVERTED)/.done $(CLIENTS) ## every client against ibid and the provider
	$(BIN)/python -m tests.conformance $(ARGS)
	$(BIN)/python -m tests.conformance --loops $(ARGS)
	$(BIN)/python -m tests.conformance --llm $(ARGS)
	$(BIN)/python -m tests.conformance.schema

real-life: $(DEV_STAMP) $(CONVERTED)/.done ## hits without labels, on three seeds of two streams, beside fixed cosines
	$(TEST_ENV) $(BIN)/python -m tests.bench.reallife $(ARGS)

bench: $(DEV_STAMP) ## ibid against its floors in turn, as a table of ratios
	$(BIN)/python -m tests.bench $(ARGS)

# It prints the SHA-256s that `index/guard/head.py` must hold, other weights than those are refused; and what
# `index/guard/prior.py` says, measured on families that the second head was kept from.
train-guard: $(DEV_STAMP) ## the pair guard's weights anew from the licensed pairs in DATA=DIR, and its prior; half an hour on one core
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m index.guard.training.train --data "$(DATA)" --into index/guard --held-out build/held-out.safetensors
	$(BIN)/python -m tests.bench.prior --held-out build/held-out.safetensors

clean: ## remove the environments and every cache; never data
	rm -rf $(VENV) $(VENV_OPENAI2) $(VENV_FRAMEWORKS) $(VENV_AGENTS) $(VENV_AIDER) tests/conformance/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find proxy index migrations tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: without it in place, whatever asks for it might bring another build along.
$(RUN_STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "ibid needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) $(TORCH_PIP_ARGS) torch
	$(PIP) --no-build-isolation -e .
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c '$(STARTS)'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP) --no-build-isolation -e '.[test,lint]'
	@touch $@

$(MODEL): deploy/fetch_llm.py | $(RUN_STAMP)
	$(BIN)/python deploy/fetch_llm.py $@
	@touch $@

# The bundled model as the tests use it, converted once for all their processes; again when the converter changes.
$(CONVERTED)/.done: index/artefact.py index/convert.py index/embedder.py index/model.py tests/models.py | $(RUN_STAMP)
	rm -rf $(CONVERTED)
	$(BIN)/python -m tests.models
	@touch $@

$(OPENAI2_STAMP): deploy/constraints-openai2.txt
	test -x $(VENV_OPENAI2)/bin/python || $(PYTHON) -m venv $(VENV_OPENAI2)
	$(VENV_OPENAI2)/bin/python $(PIP_INSTALL) -r deploy/constraints-openai2.txt
	@touch $@

$(FRAMEWORKS_STAMP): deploy/constraints-frameworks.txt
	test -x $(VENV_FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(VENV_FRAMEWORKS)
	$(VENV_FRAMEWORKS)/bin/python $(PIP_INSTALL) -r deploy/constraints-frameworks.txt
	@touch $@

$(AGENTS_STAMP): deploy/constraints-agents.txt
	test -x $(VENV_AGENTS)/bin/python || $(PYTHON) -m venv $(VENV_AGENTS)
	$(VENV_AGENTS)/bin/python $(PIP_INSTALL) -r deploy/constraints-agents.txt
	@touch $@

$(AIDER_STAMP): deploy/constraints-aider.txt
	test -x $(VENV_AIDER)/bin/python || $(PYTHON) -m venv $(VENV_AIDER)
	$(VENV_AIDER)/bin/python $(PIP_INSTALL) -r deploy/constraints-aider.txt
	@touch $@

$(NODE_STAMP): tests/conformance/package.json tests/conformance/package-lock.json
	cd tests/conformance && npm ci --no-audit --no-fund --ignore-scripts
	@touch $@
