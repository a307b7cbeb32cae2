# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else; everything lands in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test quick slow docs-test faults versions lint install clean

help:
	@echo "make demo   train on handwritten digits, look at demo/digits.png (a few minutes on two CPU cores)"
	@echo "make test   linter, type checker and all but the slow tests (5 minutes on two cores)"
	@echo "make quick  a few tests of every package, in a minute, for use while working"
	@echo "make slow   what make test leaves out: tests of tests/slow.txt, compilations, damaged files by the thousand"
	@echo "make docs-test  runs every example and notebook"
	@echo "make faults kills, starves and poisons trainings many times; prints what was tried and survived (minutes)"
	@echo "make versions  main commands and tests on the lowest and the newest versions allowed, in environments of their own"
	@echo "make clean  remove .venv and what the build left"

demo: $(VENV)/.digits
	$(BIN)/lamamba demo --out demo $(ARGS)

# One thread for each of pytest's processes: threads that wait for each other on shared cores wait long. Whole files go
# to a process, so that what a file makes for its tests is made once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

quick: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile @tests/quick.txt $(ARGS)

# Not the files with the most tests first: those with few have the longest, which would end alone.
slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

docs-test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto -m docs tests $(ARGS)

faults: $(VENV)/.test
	OMP_NUM_THREADS=1 LAMAMBA_FAULTS=full $(BIN)/python -m pytest tests/faults -m faults $(ARGS)

versions: $(VENV)/.test
	$(BIN)/python tests/versions.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/.digits

$(VENV)/.created:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.digits: $(VENV)/.created pyproject.toml constraints.txt setup.py $(wildcard lamamba/csrc/*)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[digits]'
	touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt setup.py $(wildcard lamamba/csrc/*)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .versions build dist *.egg-info lamamba/_native/*.so
