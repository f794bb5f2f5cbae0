# The commands of everyday work; see CONTRIBUTING.md. PYTHON is the interpreter of the virtual environment.
PYTHON ?= .venv/bin/python
# What takes longest: whole programs, runs that are killed, hostile files, trainings to a known optimum.
SLOW = tests/examples tests/robustness tests/runs tests/evaluation tests/docs tests/rl/test_optimum.py

.PHONY: setup test fast lint lines docs bench gpu mutants release

setup: ## a virtual environment with everything that the tests need, and the checks before a commit
	test -d .venv || python3 -m venv .venv
	.venv/bin/pip install -q -c tests/constraints.txt -e '.[dev]' pre-commit
	.venv/bin/pre-commit install

test: ## all tests
	$(PYTHON) -m pytest

fast: ## the tests that take no more than a few minutes together
	$(PYTHON) -m pytest $(SLOW:%=--ignore=%)

lint: ## style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	MINIRLHF_TYPES=1 $(PYTHON) -m pytest -q -n 0 tests/docs/test_typed_pages.py

lines: ## the line numbers of the links in docs/details.md
	$(PYTHON) tests/docs/line_numbers.py

docs: ## the site of docs/, into site/; needs the extra docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

bench: ## seconds and memory of one iteration of PPO, against what this machine can do
	$(PYTHON) examples/benchmark --precision fp32 bf16

gpu: ## the tests that need a GPU, decoding with and without a CUDA graph, the benchmark; writes docs/gpu/DATE.md
	PYTHONPATH=examples $(PYTHON) -m benchmark.gpu_record

mutants: ## plants faults in a copy of the package, and says which ones no test notices; hours
	$(PYTHON) tests/robustness/mutants.py

release: ## builds wheels and sdist into dist/, and tries them in fresh environments; uploads nothing
	.ci/release
