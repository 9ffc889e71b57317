# Every target makes the virtual environment it needs, once, and uses it again. No other set-up is needed.
PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-hf quality style bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: .venv/.demo  ## name and find pictures with the bundled checkpoint; writes demo/report.html
	$(BIN)/python examples/demo.py --out demo

test: .venv/.dev  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: .venv/.dev  ## run the slow tests only
	$(BIN)/python -m pytest -m slow

test-hf: .venv/.dev  ## run transformers' own common tests on every class (fetches them once)
	$(BIN)/python -m tests_hf -n $(WORKERS)

quality: .venv/.dev  ## check lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/.dev  ## mend lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev  ## compare speed and memory with the peers': towers, detection, fusion (an hour or two)
	$(BIN)/python benchmarks/vision_tower.py
	$(BIN)/python benchmarks/video.py
	$(BIN)/python benchmarks/detection.py
	$(BIN)/python benchmarks/fusion.py

clean:  ## remove caches and build outputs; .venv stays
	rm -rf build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests tests_hf examples conversion benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The demo needs less than development does: two stamps, one environment. The second covers the first.
.venv/.demo: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install -e '.[ui]'
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/pip
	$(BIN)/python -m pip install -e '.[dev]'
	@touch .venv/.demo $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
