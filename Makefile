# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make quickstart    make a .venv, install, train a small Megalodon on the CPU, sample from it
#   make test          the whole test suite, with the linter and the type checker
# And one for whoever changes how ranks share the work:
#   make layouts       every layout of up to 8 processes against one process, 8 minutes on 2 cores

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed first, so that nothing else chooses a build. Any torch from 2.11 to 2.13 will do: make install TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test layouts lint types install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m megalodon_plugin.cli.quickstart

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# With worksteal the tests of a file stay with one process, which sets up what they share once, until another has none left.
test: lint types
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

layouts: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m megalodon_plugin.bench.parallel.matrix

clean:
	rm -rf $(VENV) build *.egg-info
