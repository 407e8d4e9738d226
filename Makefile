# Everything starts from a bare Python 3.11+, venv and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo check test test-long soak fuzz versions bench docs lint audit setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps lmms-eval -c constraints.txt
	touch $@

demo: setup
	$(BIN)/aimv2 pretrain --run $(RUN) $$(test ! -e $(RUN)/config.yaml || echo --resume)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/house.py --check
	$(BIN)/python tools/api_stubs.py --check
	$(BIN)/python tools/messages.py --check

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not long and not engine'

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -n 2 --dist loadfile -m engine

test-long: setup
	$(BIN)/python -m pytest -m long
	$(BIN)/python tests/long/break_lines.py

# half an hour of faults on one and on two ranks: make soak MINUTES=30 SEED=0
MINUTES ?= 30
SEED ?= 0
soak: setup
	$(BIN)/python tests/long/soak.py --minutes $(MINUTES) --seed $(SEED)

# files that are spoiled at random, under every reader: make fuzz MINUTES=30 SEED=0
fuzz: setup
	$(BIN)/python tests/long/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# another Python or torch: make versions PYTHON=python3.14 TORCH=2.14.1
TORCH ?= 2.13.0
TRIED := .venv-versions
TRIED_TESTS ?= tests/models tests/train/test_golden.py tests/test_cli.py tests/test_errors.py
versions:
	$(PYTHON) -m venv --clear $(TRIED)
	$(TRIED)/bin/python -m pip install --quiet torch==$(TORCH) -e '.[peft]' pytest hypothesis
	$(TRIED)/bin/aimv2 doctor
	$(TRIED)/bin/aimv2 pretrain --run $(TRIED)/demo --train.steps 12 --optim.warmup 2 --eval.samples 32 --eval.probe false
	CUDA_VISIBLE_DEVICES= $(TRIED)/bin/python -m pytest $(TRIED_TESTS)

bench: setup
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/data.py

# the installed packages against constraints.lock: make audit ADVISORIES=osv.zip
ADVISORIES ?=
audit:
	$(BIN)/python tools/lock.py check $(if $(ADVISORIES),--advisories $(ADVISORIES))

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(TRIED) .pytest_cache .mypy_cache .ruff_cache
