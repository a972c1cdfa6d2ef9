VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := modeling_mcd trainers evaluation tests benchmarks demo examples docs/site setup.py

.PHONY: setup distill evaluate demo space docs test test-slow test-soak quality style bench gpu-day gpu-wheels clean

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

# The full table of the last `make distill`: its teacher and the last round's student under both lockings and, at few steps, with
# their chain; 512 samples for each of 3 seeds, temperatures for the matched columns, and the bound. Hours on two cores; killed and
# started again, it goes on where it was.
EVALUATE := $(BIN)/python evaluation/run_eval.py teacher=runs/tiny/teacher round-3=runs/tiny/round-3 --output_dir runs/tiny \
	--judge recipes/tiny/judge --entropy_unit words --samples 512 --seeds 3 --batch_size 8 --lockings independent spread --bound 512 \
	--reference_text recipes/tiny/text/validation --vocabulary_text recipes/tiny/text/train

evaluate: setup
	$(EVALUATE) --steps 8 --temperatures 1.0 0.8 0.7 0.4 0.3
	$(EVALUATE) --steps 4 16 --temperatures 1.0 0.8 0.7
	$(EVALUATE) --steps 2 32
	$(EVALUATE) --steps 2 4 --lockings spread+coupling --temperatures 1.0 0.9 0.8

# Two models write side by side, in a browser.
demo: setup
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[demo]"
	$(BIN)/python demo/app.py

# The same as a Space of the Hub, complete in one folder.
SPACE ?= runs/space
space:
	mkdir -p $(SPACE)/recipes/tiny $(SPACE)/recipes/bible
	cp demo/README.md demo/requirements.txt demo/app.py demo/studio.py $(SPACE)
	cp -r modeling_mcd evaluation $(SPACE)
	cp -r recipes/tiny/teacher recipes/tiny/coupled recipes/tiny/judge $(SPACE)/recipes/tiny
	cp -r recipes/bible/teacher $(SPACE)/recipes/bible
	find $(SPACE) -name __pycache__ -prune -exec rm -rf {} +

# The pages as a site, in build/site; a link that leads nowhere is an error.
docs: setup
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/site/stage.py build/pages
	$(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

test: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -q -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -q -m slow

# Runs that are killed at random moments, hundreds of times, on bad disks and clocks: docs/reliability.md. MINUTES=2 for fewer.
MINUTES ?= 15
test-soak: setup
	PYTHONPATH=. $(BIN)/python tests/soak.py --minutes $(MINUTES)

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

# What only a GPU can show: docs/gpu_day.md. On a borrowed machine there is no .venv, and its own Python does it.
STAGE ?= all
gpu-day:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_day $(STAGE) $(OPTIONS)

# What such a machine lacks, for Python 3.12 on Linux, at the versions of a file; and which commit travels. With NOVELS=FILE
# the weight of everything that is carried is checked; no stage needs the models of recipes/bible.
WHEELS := .wheels
MOST_MB ?= 64
STAYS := ':!recipes/bible/teacher' ':!recipes/bible/judge'
gpu-wheels: setup
	rm -rf $(WHEELS)
	$(BIN)/pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(foreach tag,2_28 2_27 2_24 2_17,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64 \
		-r benchmarks/gpu_day/wheels.txt -d $(WHEELS)
	DS_BUILD_OPS=0 $(BIN)/pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation -c constraints.txt \
		-w $(WHEELS) deepspeed
	git rev-parse HEAD > $(WHEELS)/COMMIT
	@bytes=$$(($$(git ls-files -z -- $(STAYS) | du -cb --files0-from=- | tail -1 | cut -f1) + $$(du -sb $(WHEELS) | cut -f1) \
		+ $$(if [ -n "$(NOVELS)" ]; then stat -c %s "$(NOVELS)"; else echo 0; fi))); \
	echo "checkout without the bible models, wheels$(if $(NOVELS), and novels,): $$((bytes / 1000000)) MB"; [ $$bytes -lt $$(($(MOST_MB) * 1000000)) ]

# Not the runs: they take hours to make again.
clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
