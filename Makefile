# Each target does all of its own set-up, in .venv; Python 3.10 or later is all that has to be there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The tensors of the tests and the demo are tiny: more threads would wait for each other.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster check format figures clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.experiments  ## compare four normalisations on real digits: a table and a picture
	$(BIN)/kernelnorm compare digits-vgg8 --norms batch,group,layer,kernel --batch-sizes 2,32 \
		--out runs/demo

test: $(VENV)/.dev  ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-cluster: $(VENV)/.cluster  ## run the tests that need a Ray cluster: they begin one here
	$(BIN)/python -m pytest tests/test_cluster.py

check: $(VENV)/.dev  ## check style, types and the examples of the docstrings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules kernelnorm

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

figures: $(VENV)/.experiments  ## draw the figures of the documentation
	for script in docs/figures/*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## remove what the targets above have made, but not runs and data
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.experiments: pyproject.toml constraints.txt
	$(call install,experiments)

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,dev)

$(VENV)/.cluster: pyproject.toml constraints.txt
	$(call install,dev$(comma)cluster)

comma := ,
define install
@echo "installing kernelnorm[$(1)] into $(VENV): the first time takes a few minutes"
@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
@$(PIP) --editable '.[$(1)]'
@touch $@
endef
