# make check: lint and the fast tests, for the edit loop. make test: the whole suite. make demo: the whole route on
# generated images. Each installs the environment first if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV)/bin)
DEMO := demo
# torchrun's own; one thread a process, since the demo and the suite start several.
export OMP_NUM_THREADS ?= 1

.PHONY: check test demo lint clean

$(VENV)/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/development: $(VENV)/runtime pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps trackio  # it wants an older Pillow, and works with this one
	touch $@

check: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test: $(VENV)/development
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: $(VENV)/development
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

demo: $(VENV)/runtime
	PATH="$(BIN):$$PATH" bash demo.sh $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache .hypothesis
