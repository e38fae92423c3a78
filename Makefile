# The one door, for people and for CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL := smollm2-135m-instruct
TEST_PROCESSES := 2

.PHONY: help install run test test-slow test-gpu lint format bench bench-training quality proto docs clean

help:
	@echo "make install    the environment for serving, in $(VENV)"
	@echo "make run        install, fetch $(MODEL), serve it on 127.0.0.1 (HTTP 8000, gRPC 8001)"
	@echo "make test       install the development tools and run every check that CI runs"
	@echo "make test-slow  the tests that take minutes (soak, real-model matrices)"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make lint       ruff, mypy, import-linter, generated files up to date"
	@echo "make bench      the serving benchmark against transformers, in one run"
	@echo "make bench-training  the training step against plain torch, and the pipeline against its formula"
	@echo "make quality    every real run of dialogue, stories, retrieval and synthetic questions (hours), and its bars"
	@echo "make proto      regenerate the protobuf code;  make docs  regenerate the reference tables"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[serve]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/.installed-serve

install: $(VENV)/.installed-serve

run: install
	@$(BIN)/trilithon pull $(MODEL)
	@$(BIN)/trilithon serve $(MODEL)

test: lint
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow --timeout 3600

test-gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python clients/proto/generate.py --check
	$(BIN)/python docs/generate.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed-dev
	$(BIN)/python clients/proto/generate.py

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/serving.py

bench-training: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/pipeline.py

RUN := $(BIN)/python benchmarks/quality/

# Real data and the two models of the store; results and bars lie in benchmarks/quality.
quality: $(VENV)/.installed-dev
	for case in zero_shot sentences "ict --epochs 6" dpr dpr_new; do $(RUN)retrieval.py $$case || exit 1; done
	for case in readers refresh; do $(RUN)openqa.py $$case || exit 1; done
	for case in persona grounded; do $(RUN)dialogue.py $$case || exit 1; done
	for case in ranker "keywords --train 500" "sentences --train 80" "control --dev 40"; do \
		$(RUN)stories.py $$case --folder runs/stories || exit 1; done
	for case in answers questions filter "readers --seeds 1 2 3"; do \
		$(RUN)synthetic_qa.py $$case --folder runs/synthetic || exit 1; done
	$(RUN)bars.py

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache
