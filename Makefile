# `make demo` and `make test` need Python >= 3.12 and nothing else: each sets itself up in .venv.
# `make PYTHON=/path/to/python ...` chooses the interpreter.

PYTHON ?=
export PYTHON
BIN := .venv/bin
WORKERS ?= 2

.PHONY: help demo test browser lint types clean

help:
	@echo "make demo    a three-shot video, outputs/demo.mp4"
	@echo "make test    the tests"
	@echo "make browser the page in Chromium; installs both"
	@echo "make lint    style and format"
	@echo "make types   type check"
	@echo "make clean   remove .venv, caches and builds"

demo:
	@.ci/setup run
	$(BIN)/python -m launch.sample --config=configs/tiny.py \
	  --script=configs/scripts/demo.json --out=outputs/demo.mp4

test:
	@.ci/setup dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not gpu and not browser"

browser:
	@.ci/setup dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m playwright install chromium || command -v chromium || command -v google-chrome
	$(BIN)/python -m pytest -q -m browser tests/serve

lint:
	@.ci/setup dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	@.ci/setup dev
	$(BIN)/pyrefly check

clean:
	rm -rf .venv .jax_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
