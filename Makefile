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

# accelerate gives a process on a CPU one thread unless it is told otherwise.
distill: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(PYTHON) -c 'import os; print(os.cpu_count())')} $(BIN)/accelerate launch trainers/run_mcd.py recipes/tiny.yaml

# The full table of the last `make distill`: its teacher under both lockings, and the last round's student, with 512 samples for
# each of 3 seeds, temperatures for the matched columns, and the bound. Hours on two cores; killed and started again, it goes on
# where it was.
EVALUATE := $(BIN)/python evaluation/run_eval.py teacher=runs/tiny/teacher round-3=runs/tiny/round-3 --output_dir runs/tiny \
	--judge recipes/tiny/judge --entropy_unit words --samples 512 --seeds 3 --batch_size 8 --lockings independent spread --bound 512 \
	--reference_text recipes/tiny/text/validation --vocabulary_text recipes/tiny/text/train

evaluate: setup
	$(EVALUATE) --steps 8 --temperatures 1.0 0.8 0.7 0.4 0.3
	$(EVALUATE) --steps 4 16 --temperatures 1.0 0.8 0.7
	$(EVALUATE) --steps 2 32

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
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.sampling --memory
	$(BIN)/python -m benchmarks.load_checkpoint
	$(BIN)/python -m benchmarks.divergence
	$(BIN)/python -m benchmarks.distillation_step

# Not the runs: they take hours to make again.
clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
