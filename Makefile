# make demo    set up, build, and train a VAE on real digits (about two minutes on two cores)
# make test    set up, build, and run the tests
# make lint    ruff, clang-format, mypy
# make bench   timings against PyTorch on this machine
# make clean   remove what the others made (runs/ stays)

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
SOURCES := $(shell find csrc fastgen setup.py pyproject.toml -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inl' -o -name setup.py -o -name pyproject.toml)

.PHONY: demo test lint bench clean

# A run that was stopped goes on; a finished one only says where its results are.
demo: $(VENV)/.built-demo
	@if [ -e $(RUN)/config.json ]; then \
	  echo "$(RUN) is there already: going on with it (RUN=runs/another starts a new one)"; \
	  $(BIN)/fastgen train vae --resume $(RUN); \
	else \
	  $(BIN)/fastgen train vae --data mnist --out $(RUN); \
	fi

test: $(VENV)/.built-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest benchmarks --benchmark-disable

bench: $(VENV)/.built-test
	$(BIN)/fastgen bench

lint: $(VENV)/.built-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

# An environment with torch, then the package in place, built against that torch.
$(VENV)/.torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python 3.10 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: venv is missing: apt install python3-venv"; exit 1; }
	@echo "Installing PyTorch into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch numpy 'setuptools>=77'
	@touch $@

$(VENV)/.built-%: $(VENV)/.torch $(SOURCES)
	@echo "Building fastgen ($*) ..."
	@$(PIP) install -c constraints.txt --no-build-isolation --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastgen/*.so fastgen/build_info.json
