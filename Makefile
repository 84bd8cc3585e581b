# make demo, make test: everything from a machine that has python3 (3.11 or newer, with venv) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test faults fuzz lint format recipes clean

demo: $(READY)
	$(BIN)/mimlet demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

# Everything of tests/faults: half an hour. `make test` does a sample of it.
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/faults --faults full

# A hundred times as many damaged and hostile files as `make test` tries: minutes. What it finds comes with its example.
fuzz: $(READY)
	MIMLET_FUZZ=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests/fuzz

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

recipes: $(READY)
	$(BIN)/mimlet recipes

clean:
	rm -rf $(VENV)

# A stamp: what is there is used again until the dependencies change.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
