# make demo   the main job on digits, from nothing to an exported int8 model
# make test   the tests
# make check  style, types and layering
# Each first makes .venv with the tested versions of constraints.txt. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := runs/quickstart

.PHONY: demo test check

demo: $(INSTALLED)
	$(BIN)/nas run quickstart --out $(DEMO)
	@echo "Results: $(DEMO)/front.json, $(DEMO)/front.png and the exported model under $(DEMO)/exports/"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fitnest needs Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
