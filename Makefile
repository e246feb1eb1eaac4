# Two commands for a fresh machine: `make demo` and `make test`. Both build .venv first; neither needs a GPU or a hub.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# As many workers as there are CPUs (PYTEST_XDIST_AUTO_NUM_WORKERS says otherwise), at most 8: each holds about 1 GB and
# computes on one thread. The tests of a file share its runs, so they stay on one worker.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lint types unit clean help

help:
	@echo "make demo    train a source, prune it while it trains, compare with from-scratch (three to eight minutes)"
	@echo "make quick   lint and the cheap tests: no whole run, no second process (at most two minutes)"
	@echo "make test    lint, types and all tests (six to ten minutes on two cores)"
	@echo "make clean   remove the virtual environment and caches (never your runs)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "efficientllm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/efficientllm demo

# mypy works beside the tests and speaks after them, only where it has found something.
test: lint
	@report=$$(mktemp); $(BIN)/mypy >"$$report" 2>&1 & types=$$!; \
	$(PYTEST); tests=$$?; \
	wait $$types || { cat "$$report"; tests=1; }; \
	rm -f "$$report"; exit $$tests

quick: lint
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(PYTEST)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
