# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
CONTAINER ?= docker

.PHONY: demo test lint docs pytest oldest package wheel container bench clean

demo: .venv/demo.stamp
	$(BIN)/featnorm demo

test: lint pytest

# Two processes of one thread each: with more, threads wait for each other and take several times as long. Files with
# slow tests come first (tests/helpers/running.py), not those with the most tests. Bytecode is written even where
# that is turned off, as the tests start many processes.
pytest: .venv/dev.stamp
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# The oldest versions that pyproject.toml allows. uv finds them in seconds. It downloads 3 GB, most of it CUDA, unless
# UV_TORCH_BACKEND=cpu takes PyTorch's builds for the CPU.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# The source distribution and the wheel, in dist/.
package: .venv/package.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# The wheel in an empty environment, where its demonstration runs.
wheel: package
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/pip install --quiet dist/*.whl
	.venv-wheel/bin/featnorm demo

container:
	$(CONTAINER) build --tag featnorm .

# The site, in docs/_build: a warning, a broken link or a page that no menu leads to is an error.
docs: .venv/docs.stamp
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build

# Takes hours. `python -m pytest benchmarks/test_knn.py --small` tries one topic in seconds; with --results FOLDER and
# without --small, its rows replace the old ones there. Some benchmarks take longer than the five minutes after which a
# test counts as hung: -o faulthandler_timeout=0.
bench: .venv/bench.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-quiet --results featnorm-benchmarks -o faulthandler_timeout=0
	$(BIN)/python tools/update_results.py featnorm-benchmarks

clean:
	rm -rf .venv .venv-oldest .venv-wheel dist docs/_build featnorm-demo featnorm-evaluation featnorm-reproduction \
		featnorm-benchmarks

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "featnorm needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

.venv/package.stamp: | .venv/bin/python
	$(BIN)/pip install --quiet build twine check-wheel-contents
	touch $@

.venv/docs.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

# Without oodeel's requirements: it requires an older numpy than featnorm does.
.venv/bench.stamp: .venv/dev.stamp
	$(BIN)/pip install --quiet --no-deps oodeel==0.4.0
	touch $@
