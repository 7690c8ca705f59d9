# Every command creates .venv if it is missing, and updates it when pyproject.toml has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-versions lint test-slow zoo clean

demo: $(STAMP)
	$(BIN)/gflow prune --config configs/demo.yaml --name $(RUN)
	$(BIN)/gflow test --ckpt_path checkpoints/$(RUN)/best.ckpt --base checkpoints/$(RUN)/unpruned.ckpt --name $(RUN)-test
	@echo "Accuracy and filters left over the epochs: checkpoints/$(RUN)/training.png"

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The suite on the oldest and the newest versions of torch and Lightning that pyproject.toml allows.
test-versions: .venv-oldest/.installed .venv-newest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2

.venv-%/.installed: pyproject.toml .ci/versions-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --constraint .ci/versions-$*.txt --editable ".[dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore tests/channels/test_channels_zoo.py

# All networks of docs/coverage.md; takes hours.
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/channels/test_channels_zoo.py

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'gflow_pl needs Python >= 3.11: make PYTHON=python3.11 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info
