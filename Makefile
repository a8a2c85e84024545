# make demo, make test: each makes .venv first, once.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
BIN := $(VENV)/bin
READY := $(VENV)/.installed

help:
	@echo "make demo    the paper's comparison on drawn ground, in minutes on 2 CPU cores: out/demo"
	@echo "make test    the tests (those marked slow: make test TEST='-m slow')"
	@echo "make venv    only install the pinned requirements into $(VENV)"
	@echo "             PYTHON=python3.13, VENV=path and REQUIREMENTS=file can be set"

$(READY): $(REQUIREMENTS)
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'Python 3.11 to 3.13 is needed, found ' + sys.version.split()[0] + '; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

venv: $(READY)

demo: $(READY)
	$(BIN)/python study.py $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest $(or $(TEST),-m 'not slow')

.PHONY: help venv demo test
