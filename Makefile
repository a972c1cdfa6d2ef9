VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := modeling_mcd trainers evaluation tests benchmarks setup.py

.PHONY: setup distill evaluate test test-slow quality style bench clean

setup: $(VENV)/installed

# torch first and alone: the pinned CPU build, so that nothing that follows asks for another one.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	touch $@

distill: setup
	$(BIN)/accelerate launch trainers/run_mcd.py recipes/tiny.yaml

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -q -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest tests -q -m slow

quality: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: setup
	$(BIN)/python benchmarks/reveal_first.py

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache runs
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
