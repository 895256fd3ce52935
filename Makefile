# make demo   installs, runs everything on generated scenes
# make test   installs, checks style and types, runs the tests
# make test-faults  kills every command, fills its disk, damages its files, gives it odd names
# make test-slurm   runs the workflow on a SLURM cluster, made for it (Debian: apt install slurm-wlm munge)
# make docs   installs, builds the pages in docs/_build/index.html
# make bench  installs, measures speed, memory, scale and the generated scenes (benchmarks/README.md)
# make clean  removes the environment, caches and the demo's results; other results stay
CORES ?= all
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

.PHONY: demo test test-faults test-slurm lint docs install bench clean

demo: install
	snakemake --cores $(CORES)

test: lint
	pytest -n 2 --dist worksteal --ignore tests/slurm --ignore tests/faults

test-faults: install
	pytest -n 2 --dist worksteal tests/faults

test-slurm: install
	pytest -n 2 --dist loadgroup tests/slurm

lint: install
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow/rules
	python workflow/lint.py

docs: install
	sphinx-build -W --keep-going -q -b html docs docs/_build

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	if command -v uv > /dev/null; then \
	  uv venv --quiet --clear --python '>=3.11' .venv && \
	  uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[dev,slurm,docs]'; \
	else \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.12")' && \
	  $(PYTHON) -m venv --clear .venv && .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,slurm,docs]'; \
	fi
	touch $@

bench: install
	python benchmarks/scenes.py
	python benchmarks/data.py
	python benchmarks/train.py
	python benchmarks/memory.py
	python benchmarks/stage2.py
	python benchmarks/scale.py
	python benchmarks/svm.py

clean:
	rm -rf .venv results/scenes docs/_build docs/_generated .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
