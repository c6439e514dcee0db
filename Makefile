# Two commands do everything from a bare clone (Python 3.11+, make and the package index):
#   make bench   how robust are two real models on real digits? The report lands in runs/.
#   make test    the tests; at most ten minutes on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More threads than idle cores make small models many times slower.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: bench test check laws overhead clean

bench: $(VENV)/.core
	$(ONE_THREAD) $(BIN)/robustkit bench

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -q

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# At least 100,000 generated cases over the laws, new ones each night.
laws: $(VENV)/.dev
	$(ONE_THREAD) HYPOTHESIS_PROFILE=nightly CASES=$(or $(CASES),1000) $(BIN)/python -m pytest -q --timeout=7200 tests/test_laws.py

overhead: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp each, so that `make bench` need not install what only the tests use.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.core
