# Two commands do the work: `make paper` and `make test`. Each makes .venv by itself.
PRESET ?= mini
DATA   ?=
PROFILE ?=
CORES  ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install paper plan verify test sync notebooks hooks lab readme docs demo bench tensorboard clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PRESET=smoke|mini|public|full|paper (now: $(PRESET))   DATA=<data root>   CORES=<n> (now: $(CORES))   PROFILE=profiles/slurm: on a cluster"

install: $(STAMP) ## make .venv with the exact versions of constraints.txt (done by the others when needed)

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Call: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes, about 7 GB, once)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

paper: $(STAMP) ## run the study PRESET and make its tables and figures: paper_results/PRESET
	@$(BIN)/gk-mvlp paper --preset "$(PRESET)" --data "$(DATA)" --cores $(CORES) --profile "$(PROFILE)"

plan: $(STAMP) ## list the jobs that `make paper` would run
	@$(BIN)/gk-mvlp paper --preset "$(PRESET)" --data "$(DATA)" --cores $(CORES) --dry-run

verify: $(STAMP) ## recompute the tables of PRESET from its saved predictions; any difference is an error
	@$(BIN)/gk-mvlp verify --preset "$(PRESET)"

test: $(STAMP) ## sync check, notebooks, pytest and a smoke study
	@CORES=$(CORES) bash scripts/test.sh

sync: $(STAMP) ## export and clean the notebooks, then say whether the library was in step with them
	@bash scripts/sync.sh

notebooks: $(STAMP) ## execute the library notebooks in place, so that their outputs are current
	@$(BIN)/python scripts/execute_notebooks.py

hooks: $(STAMP) ## install git hooks that keep notebooks clean and the library in step
	@bash scripts/install_hooks.sh

lab: $(STAMP) ## open JupyterLab with the kernel of .venv
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs --MultiKernelManager.default_kernel_name=python3

readme: $(STAMP) ## write the generated part of README.md from paper_results
	@$(BIN)/python scripts/update_readme.py

docs: $(STAMP) ## build the documentation site, offline: _docs/index.html
	@$(BIN)/python scripts/build_docs.py

demo: $(STAMP) ## a page to try a model on: http://127.0.0.1:7860 (DATA: X-rays to pick from)
	@$(BIN)/gk-mvlp demo --pictures "$(DATA)"

bench: $(STAMP) ## speed beside yardsticks, on a quiet machine: benchmarks/results (BENCH="images phantom": only these)
	@$(BIN)/python benchmarks/all.py $(BENCH)

tensorboard: $(STAMP) ## loss curves of all runs
	@$(BIN)/tensorboard --logdir runs

clean: ## remove runs of PRESET (tables and figures stay)
	rm -rf runs/$(PRESET)
