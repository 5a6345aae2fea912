# SummerLM's everyday commands. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install peers demo test slow lint types docs checks clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

peers: .venv/peers

.venv/peers: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev,peers]" --constraint constraints.txt
	$(BIN)/pip check
	touch $@

demo: install
	$(BIN)/summerlm demo

test: install
	$(BIN)/pytest -m "not slow and not peers" --numprocesses 2

slow: install
	$(BIN)/pytest -m "slow or peers" --numprocesses 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pydoclint --quiet summerlm

checks: lint types docs test

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
