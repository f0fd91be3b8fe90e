# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
COPY := build/check
# Models and data are local; a hub that cannot be reached is not waited for.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow check bench clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

demo: $(VENV)/.installed  ## one extraction, four tasks, one table
	$(BIN)/sherl-pipe run pipeline.yaml

test: $(VENV)/.installed  ## the fast tests, a file at a time on each of several processors
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed  ## the slow ones
	$(BIN)/pytest -m slow

check: $(VENV)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(COPY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(COPY) .
	MYPYPATH=$(COPY) $(BIN)/mypy -p sherl_pipe
	MYPYPATH=$(COPY):benchmarks $(BIN)/mypy benchmarks

bench: $(VENV)/.bench  ## the tables of docs/ and benchmarks/; takes hours
	$(BIN)/python benchmarks/minilm_glue.py search
	$(BIN)/python benchmarks/minilm_glue.py final
	$(BIN)/python benchmarks/minilm_glue.py costs
	$(BIN)/python benchmarks/minilm_glue.py table
	$(BIN)/python benchmarks/codecs.py --plot docs/codecs.svg
	$(BIN)/python benchmarks/t5_base.py run
	$(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/plan_accuracy.py
	$(BIN)/python benchmarks/digits_vit.py
	$(BIN)/python benchmarks/shared_memory.py

clean:
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache
