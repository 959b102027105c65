# Each target installs what it needs, into .venv or a folder like it; this takes Python 3.10 or later.
# A C compiler is optional: without one the layers run in PyTorch operations.

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
DOCS ?= .venv-docs
FEDERATED ?= .venv-federated
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

# The tensors of the tests and the demo are tiny: with more threads they take longer.
export OMP_NUM_THREADS ?= 1

# Only test-cluster starts a Ray cluster: in parallel with other tests it would time out.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal \
	--ignore tests/test_cluster.py --ignore tests/zoo --ignore tests/federated
# The layers' tests need neither the training programs nor their dependencies.
LAYERS := $(shell grep -L 'kernelnorm\.\(cli\|experiments\)' tests/test_*.py)
C_FILES := $(wildcard kernelnorm/ops/backends/cpu/*.c kernelnorm/ops/backends/cpu/*.h)
SANITIZED := build/sanitize/kernels.so
# The installation "cluster" includes "dev", which includes "experiments".
DEV := $(or $(wildcard $(VENV)/.cluster),$(VENV)/.dev)
EXPERIMENTS := $(or $(wildcard $(DEV)),$(VENV)/.experiments)

.DEFAULT_GOAL := help
.PHONY: help demo federated test test-slow test-all test-cluster test-newest test-zoo test-federated \
	test-sanitize test-pythons gpu-check wheel wheel-check check docs format figures clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(EXPERIMENTS)  ## compare four normalisations on real digits: a table and a picture
	$(BIN)/kernelnorm compare digits-vgg8 --norms batch,group,layer,kernel --batch-sizes 2,32 \
		--out runs/demo

federated: $(FEDERATED)/.app  ## federated training on real digits, with four clients
	$(FEDERATED)/bin/python examples/federated/run.py

test: $(DEV)  ## run the tests, without those marked slow: under 3 minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(DEV)  ## run the tests marked slow
	$(BIN)/python $(PYTEST) -m slow

test-all: test test-slow  ## run all tests

test-cluster: $(VENV)/.cluster  ## run the tests that need a Ray cluster, and start one here
	$(BIN)/python -m pytest tests/test_cluster.py

test-newest: $(DEV) $(NEWEST)/.tests  ## run the layers' tests with the newest PyTorch
	PYTHONPATH=$(CURDIR) $(NEWEST)/bin/python $(PYTEST) -m "not slow" $(LAYERS)

test-zoo: $(DEV) $(NEWEST)/.tests  ## test with networks of timm, torchvision, MONAI and others
	PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 $(NEWEST)/bin/python -m pytest -n auto --maxprocesses 4 \
		--dist worksteal tests/zoo

test-federated: $(FEDERATED)/.app  ## test federated training, with processes of Flower
	$(FEDERATED)/bin/python -m pytest -n 2 --dist worksteal tests/federated

test-sanitize: $(DEV) $(SANITIZED)  ## test the C kernels with the compiler's sanitizers
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python $(PYTEST) --kernels $(SANITIZED) -k "not triton" \
		tests/test_backends.py tests/test_fuzz.py tests/test_kernels_*.py

test-pythons: wheel  ## install the wheel in a fresh environment for each Python here: takes gigabytes
	$(BIN)/python -m pytest tests/check_pythons.py

gpu-check: $(DEV)  ## test and measure on a CUDA GPU, 10 minutes; DRY=1: a trial on the CPU
	$(BIN)/python benchmarks/gpu_check.py $(if $(DRY),--dry)

wheel: $(DEV)  ## build the wheel in dist, with the C kernels
	@rm -rf dist build/lib* build/temp* build/bdist*
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build/lib* build/temp* build/bdist*
	@ls dist/*.whl

wheel-check: $(DEV)  ## build the packages and test them in other folders and Pythons
	$(BIN)/python -m pytest tests/check_packages.py

check: $(DEV)  ## check style, types and the examples of the docstrings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules kernelnorm --ignore kernelnorm/timm.py

docs: $(DOCS)/.docs  ## build the documentation in build/docs, and check it
	$(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs build/docs
	$(DOCS)/bin/python -m pytest tests/check_site.py tests/check_configuration.py

format: $(DEV)  ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

figures: $(EXPERIMENTS)  ## draw the figures of the documentation
	for script in docs/figures/*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## remove what the targets above have made, but not runs and data
	rm -rf $(VENV) $(NEWEST) $(DOCS) $(FEDERATED) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernelnorm/ops/backends/cpu/kernels.so kernelnorm/ops/backends/cpu/kernels.dll

# The installation compiles the C kernels, so it is repeated when they change.
INSTALLED := pyproject.toml constraints.txt setup.py $(C_FILES)

$(VENV)/.experiments: $(INSTALLED)
	$(call install,experiments)

$(VENV)/.dev: $(INSTALLED)
	$(call install,dev)

$(VENV)/.cluster: $(INSTALLED)
	$(call install,dev$(comma)cluster)

# kernelnorm is not installed here: the tests import it, with its C kernels, from this folder.
# torchvision's packages need the PyTorch that they were built for. The packages after --no-deps
# require an older timm and an OpenCV for desktops; the packages that they import come before them.
$(NEWEST)/.tests: constraints.txt Makefile
	$(call create,$(NEWEST))
	@grep -v '^\(torch\|triton\)==' constraints.txt > $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python $(PIP) -c $(NEWEST)/constraints.txt 'torch==2.14.1' 'torchvision==0.29.1' \
		hypothesis numpy onnxruntime onnxscript pytest pytest-xdist setuptools \
		huggingface_hub monai pillow safetensors segmentation_models_pytorch timm \
		addict einops opencv-python-headless rich termcolor yapf
	@$(NEWEST)/bin/python $(PIP) -c $(NEWEST)/constraints.txt --no-deps \
		dynamic-network-architectures mmcv-lite mmengine-lite
	@touch $@

# Flower needs Python 3.11: an environment of an older Python is made again with $(PYTHON).
# Flower requires one version of Ray, so the version in constraints.txt is left out.
$(FEDERATED)/.app: $(INSTALLED) examples/federated/pyproject.toml
	@test ! -x $(FEDERATED)/bin/python || $(FEDERATED)/bin/python -c '$(FLOWER_PYTHON)' 2>/dev/null \
		|| rm -rf $(FEDERATED)
	@test -x $(FEDERATED)/bin/python || $(PYTHON) -c '$(FLOWER_PYTHON)'
	$(call create,$(FEDERATED))
	@grep -v '^ray==' constraints.txt > $(FEDERATED)/constraints.txt
	@$(FEDERATED)/bin/python $(PIP) -c $(FEDERATED)/constraints.txt --editable '.[experiments]' \
		'flwr[simulation]==1.42.0' 'ray==2.55.1' hypothesis pytest pytest-xdist
	@touch $@

# Uses the packages of $(VENV), for the API pages and the notebook: a second PyTorch takes 1 GB.
$(DOCS)/.docs: constraints.txt Makefile | $(DEV)
	$(call create,$(DOCS))
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/..')" \
		> $$($(DOCS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth
	@$(DOCS)/bin/python $(PIP) -c constraints.txt check-jsonschema furo ipykernel latex2mathml myst-nb \
		sphinx sphinx-copybutton sphinx-external-toc ziamath zizmor
	@touch $@

$(SANITIZED): $(C_FILES) Makefile
	@mkdir -p $(@D)
	$(CC) -g -O1 -fopenmp-simd -march=native -DKERNELNORM_ONE_TARGET -fsanitize=address,undefined \
		-fno-sanitize-recover=all -shared -fPIC -o $@ $(filter %.c,$^) -lm

comma := ,
FLOWER_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit("Flower needs Python 3.11 or later, \
	got " + sys.version.split()[0] + ": make federated PYTHON=python3.11")
define create
@echo "installing into $(1): the first time takes a few minutes"
@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || { rm -rf $(1); exit 1; }
endef
define install
$(call create,$(VENV))
@$(BIN)/python $(PIP) -c constraints.txt --editable '.[$(1)]'
@touch $@
endef
