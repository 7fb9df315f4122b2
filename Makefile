# Everything runs in .venv, which is made and filled on first use.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
PROJECTS := pyproject.toml bench/pyproject.toml
CODE := src bench examples tests
# A process per core; in each, torch's own threads would only be in the way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-oldest test-ray lint docs figures format zoo clean

demo: .venv/demo-ready
	$(BIN)/sidetuning bench demo

test: lint
	$(PYTEST) -m "not slow"

test-all: lint docs
	$(PYTEST)

# The library's fast tests with the oldest versions that pyproject.toml allows, as requirements-oldest.txt pins them.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest tests/library -m "not slow" --ignore-glob "*_packaging.py" --ignore-glob "*_budgets.py"

# Those of the extra ray, on a cluster of two nodes on this machine; one process, since each would start a cluster.
test-ray: .venv/ray-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/library/test_ray.py

lint: .venv/dev-ready
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

# The site, in site/. A dead link and a name that is not documented are errors.
docs: .venv/dev-ready
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(BIN)/python -m mkdocs build --quiet

# The figures of docs/results.md, from the committed results; the table of its numbers is printed.
figures: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python bench/records/figures.py

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

.venv/ray-ready: .venv/dev-ready
	$(BIN)/python -m pip install --quiet --editable '.[ray]'
	touch $@

.venv-oldest/ready: $(PROJECTS) requirements-oldest.txt
	test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --requirement requirements-oldest.txt
	$(OLDEST)/python -m pip install --quiet --no-deps --editable . --editable bench
	touch $@

# Every family of timm and transformers, tried. It resumes where it was stopped.
zoo: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python bench/records/run.py zoo

clean:
	rm -rf .venv .venv-oldest runs site
