# The two commands a newcomer needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# For `make test-compat`: the newest Python and the newest jax, without torch.
PYTHON313 ?= python3.13
COMPAT_VENV ?= .venv-compat

.PHONY: quickstart test test-long test-compat lint format typecheck install install-test clean

quickstart: install
	$(RUN) launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart

test: install-test
	$(RUN) -m pytest -n 2 -m "not long" tests

test-long: install-test
	$(RUN) -m pytest -m long tests

test-compat: $(COMPAT_VENV)/.installed
	$(COMPAT_VENV)/bin/python -m pytest -n 2 -m "not long" tests

# Formatter, linter, type checker, and the rules of English that a program can check.
lint: install-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(MAKE) typecheck
	$(RUN) -m pytest -q tests/test_english.py

typecheck: install-test
	$(RUN) -m pyright --pythonpath $(RUN)

format: install-test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cartridges_jax needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(COMPAT_VENV)/.installed: setup.py constraints-py313.txt
	$(PYTHON313) -c 'import sys; sys.exit(sys.version_info < (3, 13) and "make test-compat needs Python 3.13 or newer: make PYTHON313=… test-compat")'
	$(PYTHON313) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install --quiet --constraint constraints-py313.txt --editable '.[test-compat]'
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT_VENV) runs build *.egg-info
