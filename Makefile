# `make trace` and `make test` need Python 3.11, make and pip. The first run makes .venv, later
# runs reuse it; a changed pyproject.toml or requirements.lock installs again.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --disable-pip-version-check
# The versions that the tests were green with, for everybody; `make newest` tries newer ones.
INSTALL := $(PY) $(PIP_INSTALL) -c requirements.lock

.PHONY: help trace check test whole field fuzz kill matrix newest lock clean

help:
	@echo "make trace   trace the embedded demo model into demo-trace/"
	@echo "make check   lint, check types, run the tests that take seconds: in under a minute"
	@echo "make test    lint, check types, run all tests; among them, as a gate, the quick parity sweep"
	@echo "             (installs PyTorch)"
	@echo "make whole   all tests, and of those over a grid of parameters all combinations"
	@echo "make field   run every engine that is installed, healthy and broken, and write docs/field.md"
	@echo "make fuzz    20,000 damaged inputs, and what the commands make of them: docs/campaign-fuzz.md"
	@echo "make kill    200 commands killed at random moments: docs/campaign-kill.md"
	@echo "make matrix  the tests that need no PyTorch, on every Python that is claimed"
	@echo "make newest  run the tests with the newest versions that pyproject.toml allows"
	@echo "make lock    take those versions over into requirements.lock"
	@echo "make clean   remove everything that these two made"

trace: $(VENV)/core.stamp
	$(PY) -m qwen_jax.trace --stages all --overwrite

# A file of tests at a time in each process: what it makes once is made once. A process grows to 6 GB.
AT_ONCE := -n auto --maxprocesses=2 --dist loadfile

# What a change breaks first: tables, configurations, files, comparison. They compile little.
CORE := architecture manifest config aprt rows steps diff weights

check: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q $(CORE:%=tests/test_%.py)

test: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest $(AT_ONCE) --durations=15 # tests/test_gate.py: python -m tools.parity --sweep quick must exit with 0

whole: $(VENV)/test.stamp
	$(PY) -m pytest $(AT_ONCE) --whole

# Goes on where it was stopped. Engines that `make test` does not install, where they are to be had:
# pip install openvino mlx mlx-lm google-tunix
field: $(VENV)/test.stamp
	mkdir -p build
	$(PY) -m tests.field --jobs 2 --rows build/field.jsonl --markdown docs/field.md

# Each ends with 1 where a command did what none may do. CASES and KILLS may be fewer.
CASES := 20000
KILLS := 200

fuzz: $(VENV)/test.stamp
	$(PY) -m tests.campaign.fuzz --cases $(CASES) --markdown docs/campaign-fuzz.md

kill: $(VENV)/test.stamp
	$(PY) -m tests.campaign.kill --kills $(KILLS) --markdown docs/campaign-kill.md

# Python 3.11 is what `make test` runs. PyTorch's CPU build is not to be had for every Python, so what
# needs it is left out.
MATRIX := 3.12 3.13
WITHOUT_TORCH = $(shell grep -LE 'torch|transformers|nnsight|oracle' tests/test_*.py | grep -v test_readme)

matrix:
	set -e; for version in $(MATRIX); do \
	  python$$version -m venv .venv-$$version; \
	  .venv-$$version/bin/python $(PIP_INSTALL) -q -c requirements.lock -e '.[core-test,gguf]'; \
	  .venv-$$version/bin/python -m pytest $(AT_ONCE) -q -p no:cacheprovider $(WITHOUT_TORCH); \
	done

# The newest versions that pyproject.toml allows, in an environment of their own. If the tests are
# green with them, `make lock` takes them over. A constraint without a local part ("+cpu") is met by
# every build of that version.
NEWEST := .venv-newest

newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) -e '.[oracle,test]'
	$(NEWEST)/bin/python -m pytest $(AT_ONCE) -p no:cacheprovider

lock:
	$(NEWEST)/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//' > requirements.lock

# A stamp is made only after success, so an interrupted installation is done again.
$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: this needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core.stamp: pyproject.toml requirements.lock $(VENV)/made.stamp
	$(INSTALL) -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml requirements.lock $(VENV)/made.stamp
	$(INSTALL) -e '.[oracle,test]'
	@touch $(VENV)/core.stamp $@

clean:
	rm -rf $(VENV) $(NEWEST) $(MATRIX:%=.venv-%) demo-trace parity-*-cpu parity-*-gpu build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
