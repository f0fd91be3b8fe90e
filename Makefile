# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
COPY := build/check
# Models and data are local; a hub that cannot be reached is not waited for.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow check bench bench-toy clean
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
	$(BIN)/pytest -m slow --durations=30

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
	$(BIN)/python benchmarks/plan_accuracy.py --rounds 3
	$(BIN)/python benchmarks/digits_vit.py
	$(BIN)/python benchmarks/beyond.py run
	$(BIN)/python benchmarks/beyond.py table
	$(BIN)/python benchmarks/shared_memory.py
	$(BIN)/python benchmarks/scaling.py

TOY := build/toy
bench-toy: $(VENV)/.bench  ## every benchmark on little data: does it still work?
	rm -rf $(TOY) build/t5_base_toy build/minilm_glue/*-120
	$(BIN)/python benchmarks/toy_glue.py $(TOY)/glue
	$(BIN)/python benchmarks/minilm_glue.py costs --tasks stsb --methods probe lora full sherl lst --rows 120 --data $(TOY)/glue --results $(TOY)/minilm.jsonl
	$(BIN)/python benchmarks/beyond.py run --tasks cola --variants default "late 3" --data $(TOY)/glue --folder $(TOY)/beyond --results $(TOY)/beyond.jsonl
	$(BIN)/python benchmarks/beyond.py table --tasks cola --variants default "late 3" --results $(TOY)/beyond.jsonl
	$(BIN)/python benchmarks/codecs.py --tokens 500 --plot $(TOY)/codecs.svg --data $(TOY)/glue
	$(BIN)/python benchmarks/t5_base.py run --toy --rounds 1 --data $(TOY)/glue
	$(BIN)/python benchmarks/t5_base.py feed --toy --data $(TOY)/glue
	$(BIN)/python benchmarks/together.py --toy --data $(TOY)/glue
	$(BIN)/python benchmarks/extraction.py --toy --data $(TOY)/glue
	$(BIN)/python benchmarks/extraction.py profile --toy --data $(TOY)/glue
	$(BIN)/python benchmarks/plan_accuracy.py --codec int8 --task topic --limit 100
	$(BIN)/python benchmarks/digits_vit.py --toy
	$(BIN)/python benchmarks/shared_memory.py --rows 400
	$(BIN)/python benchmarks/scaling.py --rows 400 --rounds 1

clean:
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache
