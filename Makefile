# make demo: set up, then the main job on the embedded default.   make test: set up, then the default tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
# A process takes neighbouring tests, which share what they prepare, and at its end some of those of a slower one.
WORKERS := --numprocesses=logical --maxprocesses=4 --dist=worksteal

.PHONY: demo test test-all test-gpu lint bench setup clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS)

test-all: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu"

# Kernels, models and commands on a GPU; those of two GPUs are skipped where there is one.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python scripts/benchmark_attention.py
	$(BIN)/python scripts/benchmark_commands.py

setup: $(READY)

# One environment for everything; torch comes as the CPU or the CUDA build that this machine's pip offers.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 13)" 2>/dev/null || \
		{ echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

# Removes what `make demo` made, and nothing else.
clean:
	rm -rf outputs/demo
