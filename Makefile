# Thin targets: the environment once, then one command each. ARGS reach the command.
#   make serve ARGS="--port 8001"     make test ARGS="-m 'not ray'"     make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help serve test check bench bench-adapters bench-cost bench-scale peers
.DEFAULT_GOAL := help

help:
	@echo "make serve   a server on 127.0.0.1:8000; Ctrl-C stops it"
	@echo "make test    all tests"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make bench   speed beside plain PEFT, and beside other servers that are installed"
	@echo "make bench-adapters   speed and memory by number of adapters"
	@echo "make bench-cost   how a decode step grows with sequences, context and rank"
	@echo "make bench-scale   thousands of adapters in one server"
	@echo "make peers   installs those: vLLM, llama.cpp, OpenVINO; ARGS chooses"

serve: $(INSTALLED)
	@$(BIN)/vbserve serve $(ARGS)

test: $(INSTALLED)
	@$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(INSTALLED)
	@$(BIN)/python -m loadtest.bench $(ARGS)

bench-adapters: $(INSTALLED)
	@$(BIN)/python -m loadtest.bench.adapters_command $(ARGS)

bench-cost: $(INSTALLED)
	@$(BIN)/python -m loadtest.bench.cost_command $(ARGS)

bench-scale: $(INSTALLED)
	@$(BIN)/python -m loadtest.bench.scale_command $(ARGS)

peers:
	@PYTHON=$(PYTHON) loadtest/peers/install.sh bench-out/peers $(ARGS)

# Made again when the requirements change; a half-finished one is finished by the next make.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not here; install Python 3.11 or newer, or choose: make PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version), 3.11 or newer is needed; choose: make PYTHON=python3.12"; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (once; takes a few minutes)"
	@$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
