# The two commands a newcomer needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-long install install-test clean

quickstart: install
	$(RUN) launch/train.py --config=experiments/quickstart.py --workdir=runs/quickstart

test: install-test
	$(RUN) -m pytest -n 2 -m "not long" tests

test-long: install-test
	$(RUN) -m pytest -m long tests

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cartridges_jax needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
