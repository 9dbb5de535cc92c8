# Two commands: `make demo` shows what the library does, `make test` checks that it does it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint shapes clean

demo: $(READY)
	$(BIN)/moebalance demo

test: lint shapes
	$(BIN)/pytest -n 2 --dist worksteal

# The laws once more, with every annotated shape and type checked as the code runs.
shapes: $(READY)
	$(BIN)/pytest --jaxtyping-packages=moebalance,beartype.beartype tests/test_laws.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# torch first and alone: with it in place nothing pulls another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moebalance needs Python 3.11 or newer; try make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
