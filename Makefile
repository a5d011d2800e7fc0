# `make help` explains. Everything happens in .venv, in runs/ and, where tokens and compiled code are kept, in
# ~/.cache/pocket-colossus ($XDG_CACHE_HOME); benchmarks write tests/bench/results. Nothing needs root but test-system
# and bench-fabrics.
.DEFAULT_GOAL := help
.PHONY: help setup train test check test-system drill soak bench bench-save bench-price bench-sum bench-exact bench-evidence bench-stall bench-cut-off bench-torchrun bench-torchft bench-efficiency bench-detection bench-healthy bench-report bench-forecast bench-peers bench-loss bench-startup bench-scaling bench-large bench-experts bench-fabrics gpu-check clean

# Inherited, it would have every start compile torch and lightning anew: 12 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# uv does not read pip's configuration; an empty variable is harmless.
UV := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt

help: ## Show this help
	@echo "make TARGET [ARGS='key=value …']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make .venv with everything installed (torch first, at its pinned version)

# torch comes first, and like all others by its exact version. On Linux PyPI's brings CUDA along, gigabytes of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 setup"; exit 1; }
	@echo "setting up $(VENV) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q uv 2>/dev/null || $(BIN)/python -m pip install uv
	@$(UV) torch
	@$(UV) -e '.[dev]'
	@touch $@

train: setup ## Train the main job: a small model on the Python standard library's sources (ARGS: any key=value)
	@$(BIN)/colossus train $(ARGS)

test: setup ## Run the tests that need neither root nor system packages (ARGS: pytest's own)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not system and not gpu" $(ARGS)

check: setup ## Lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test-system: setup ## Run the tests that need root or system packages; they say why where they skip
	@$(BIN)/python -m pytest -m system -rs $(ARGS)

drill: setup ## A run under 30 faults of 10 kinds and its twin without any: equal bits (about 3 minutes; ARGS: any key=value)
	@rm -rf runs/drill runs/drill-twin
	@$(BIN)/colossus drill $(ARGS)

soak: setup ## The same with Llama 3's schedule, as on 100,000 GPUs for 24 days: more than 1,000 faults (an hour or two)
	@$(BIN)/colossus drill faults=colossus_100k faults.days=24 name=soak steps=8000 devices=3 model.context=32 batch.sequences=16 recovery.restarts=100 $(ARGS)

bench: setup ## Measure: our loop beside a bare one, interleaved (minutes; results in tests/bench/results)
	@$(BIN)/python -m tests.bench.loop_overhead $(ARGS)

bench-save: setup ## Measure: what a checkpoint costs the step that saves, and the steps after it (2 GB of disk)
	@$(BIN)/python -m tests.bench.background_save $(ARGS)

bench-price: setup ## Measure: the exact run beside the best inexact one, and the parts of the difference (10 minutes)
	@$(BIN)/python -m tests.bench.price $(ARGS)

bench-sum: setup ## Measure: the exact sum alone beside the backend's all-reduce (ten minutes)
	@$(BIN)/python -m tests.bench.price --sum $(ARGS)

bench-exact: setup ## The table of the law: each row one state_sha256 over ranks and sharding (half an hour; ARGS: part of a row's name)
	@$(BIN)/python -m tests.bench.exactness $(ARGS)

bench-evidence: setup ## Measure: what the checksums of each step cost (a minute or two)
	@$(BIN)/python -m tests.bench.evidence_cost $(ARGS)

bench-stall: setup ## Measure: how long survivors stand still after a kill, and when a replacement is back (minutes)
	@$(BIN)/python -m tests.bench.stall $(ARGS)

bench-cut-off: setup ## Measure: how often gloo does not tell a rank that its exchange was cut off (a few minutes)
	@$(BIN)/python -m tests.bench.cut_off

bench-torchrun: setup ## Measure: the same under torchrun, which restarts all ranks (minutes)
	@$(BIN)/python -m tests.bench.torchrun $(ARGS)

bench-torchft: setup ## Measure: the same under torchft, whose survivors go on (minutes; needs pip install torchft)
	@$(BIN)/python -m tests.bench.torchft $(ARGS)

bench-efficiency: setup ## Measure: wall time under kills beside a twin's, for us and torchft (an hour, asleep; needs pip install torchft)
	@$(BIN)/python -m tests.bench.efficiency $(ARGS)

bench-detection: setup ## Measure: wrong gradients that audits find, flipped bits that checksums see (a minute or two)
	@$(BIN)/python -m tests.bench.detection $(ARGS)

bench-healthy: setup ## Measure: alarms in 100,000 healthy steps (half an hour)
	@$(BIN)/python -m tests.bench.healthy $(ARGS)

bench-forecast: setup ## Measure: predicted steps of 4 and 8 ranks, and a drill's goodput (six minutes)
	@$(BIN)/python -m tests.bench.forecast $(ARGS)

bench-report: setup ## Measure: what the report of 100,000 steps costs (half a minute)
	@$(BIN)/python -m tests.bench.long_report $(ARGS)

bench-peers: setup ## Measure: nanoGPT, litgpt, torchtitan, transformers' Trainer, lightning's beside us (NANOGPT=PATH; under two hours)
	@$(BIN)/colossus bench out=tests/bench/results/peers.json $(ARGS)

bench-loss: setup ## Measure: time and tokens to a loss, beside nanoGPT's train.py on the same corpus (NANOGPT=PATH; half an hour)
	@$(BIN)/python -m tests.bench.to_a_loss $(ARGS)

bench-startup: setup ## Measure: from the command to the first step, cold and warm (two minutes)
	@$(BIN)/python -m tests.bench.startup $(ARGS)

bench-scaling: setup ## Measure: 1, 2, 4, 8 ranks, weak and strong (five minutes)
	@$(BIN)/python -m tests.bench.scaling $(ARGS)

bench-large: setup ## Measure: a step of a 1 B llama and of grok_small, peak memory beside the plan's (minutes; 17 GiB of memory)
	@$(BIN)/python -m tests.bench.large $(ARGS)

bench-experts: setup ## Measure: a mixture of experts beside a dense model of the same active parameters (minutes)
	@$(BIN)/python -m tests.bench.experts $(ARGS)

bench-fabrics: setup ## Measure: two hosts at 10 Gbit/s, 1 Gbit/s, 100 Mbit/s: bytes a token, tokens/s (root; ten minutes)
	@$(BIN)/python -m tests.bench.fabrics $(ARGS)

gpu-check: setup ## On a machine with a GPU: what of all this holds there, in under 8 minutes
	@$(BIN)/python -m tests.bench.gpu_check $(ARGS)

clean: ## Remove .venv and what tools leave behind (runs/ stays)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
