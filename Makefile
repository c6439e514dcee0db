# Two commands do everything from a bare clone (Python 3.11+, make and the package index):
#   make bench   how robust are two real models on real digits? The report lands in runs/.
#   make test    the tests; at most ten minutes on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More threads than idle cores make small models many times slower.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: bench test quick check laws kills requests digests overhead load universal memory pixels standard false-alarms apgd docs clean

bench: $(VENV)/.core
	$(ONE_THREAD) $(BIN)/robustkit bench

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

# For every commit, in less than two minutes: no slow tests, and three generated cases of each law instead of twenty.
quick: $(VENV)/.dev
	$(ONE_THREAD) HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -q -n 2 -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# At least 100,000 generated cases over the laws, new ones each night.
laws: $(VENV)/.dev
	$(ONE_THREAD) HYPOTHESIS_PROFILE=nightly CASES=$(or $(CASES),1000) $(BIN)/python -m pytest -q --timeout=7200 tests/test_laws.py

# Twenty kills by SIGKILL, for one worker and for two; the tests make five.
kills: $(VENV)/.dev
	$(ONE_THREAD) KILLS=20 $(BIN)/python -m pytest -q --timeout=3000 tests/bench/execution/test_kill.py

# Every malformed request as a real process; the tests make a few of them so.
requests: $(VENV)/.dev
	$(ONE_THREAD) PROCESSES=1 $(BIN)/python -m pytest -q tests/test_requests.py

# Every attack in every threat, bit for bit as in tests/digests.json, and the default plan of the bench.
digests: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python tests/digests.py --plan

overhead: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.overhead

load: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.load

universal: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.universal

memory: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.memory

# Colour images are no part of this repository: COLOURS names the folder that holds them.
PIXELS = --train $(COLOURS)/cifar10_train10k.npz --data $(COLOURS)/cifar10_val1k.npz
pixels: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.one_pixel $(PIXELS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.pixel_ceiling $(PIXELS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.evolution $(PIXELS)

FILES = $(if $(COLOURS),$(PIXELS))
standard: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.standard $(FILES)

false-alarms: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.false_alarms $(FILES)

apgd: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m benchmarks.apgd

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

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
