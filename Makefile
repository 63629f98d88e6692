# Python and make are all that is needed: the first target that runs makes .venv and installs everything into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs fmt errors wheel

demo: $(READY)
	$(BIN)/gohsp demo --out runs/demo --overwrite
	$(BIN)/gohsp evaluate runs/demo --data digits --split test

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/results_page.py --check

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

errors: $(READY)
	$(BIN)/python tests/refusals/page.py

wheel: $(READY)
	$(BIN)/python tests/wheel/check.py

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $@
