# Everything runs in .venv, which is made and filled on first use.
PYTHON ?= python3
BIN := .venv/bin
PROJECTS := pyproject.toml bench/pyproject.toml
CODE := src bench tests

.PHONY: demo test lint format clean

demo: .venv/demo-ready
	$(BIN)/sidetuning bench demo

# A process per core; in each, torch's own threads would only be in the way.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: .venv/dev-ready
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: .venv/dev-ready
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

.venv/demo-ready: $(PROJECTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[cli]' --editable 'bench[demo]'
	touch $@

.venv/dev-ready: $(PROJECTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all]' --editable 'bench[dev]'
	touch $@ .venv/demo-ready

clean:
	rm -rf .venv runs
