# make demo and make test build the environment from nothing; the second run reuses it.
# They need Python 3.10 or later with the venv module (PYTHON=python3.11 make test picks one).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test install lint types format bench zoo clean

help:
	@echo "make demo    shrink the packaged all-MiniLM-L6-v2 and print what came of it"
	@echo "make test    lint, strict types and every test"
	@echo "make zoo     run every public model case in both forms (a quick part of it is in the tests)"
	@echo "make lint | types | format | bench | install | clean"

demo: install
	$(BIN)/fxslim demo

test: lint types
	$(BIN)/python -m pytest -n 2

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $(STAMP)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tree as it is installed, because static checkers do not see through the editable install's finder.
types: install
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	rm -rf build/lib build/bdist.*
	cd build/typecheck && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fxslim

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

zoo: install
	$(BIN)/python -m benchmarks.zoo

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
