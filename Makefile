# Rule: every target is one short command that a person could type; whatever is longer lives in a script that it calls.
# A fresh machine needs git and make; `make demo` and `make test` bring the rest (vagrant/provision.sh, .venv).
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
PROVISION := $(SUDO) vagrant/provision.sh
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Through sudo only what is named reaches the tests, and nothing of root's is left in the tree.
PYTEST = $(SUDO) env $(if $(SUDO),PYTHONDONTWRITEBYTECODE=1) $(if $(MESHBPF_NO_SKIP),MESHBPF_NO_SKIP=1) $(PY) -m pytest
C_FILES := $(filter-out bpf/abi.h,$(wildcard bpf/*.c bpf/*.h bpf/lib/*.h))
ARGS :=

.NOTPARALLEL:
.PHONY: help setup packages demo test test-kernel unit golden check fmt abi test-vm bench soak clean
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: packages $(VENV)/.run ## what demo and test need first: system packages, .venv, meshbpf in it
	$(if $(filter setup,$(MAKECMDGOALS)),@echo ready: $(VENV)/bin/meshbpf)
packages:
	@$(PROVISION) run

demo: setup ## small services, real traffic, one planted fault
	@$(SUDO) $(VENV)/bin/meshbpf demo $(ARGS)

test: setup $(VENV)/.test ## every test this machine can run (ARGS='-k name' narrows)
	@$(PROVISION) test
	$(PYTEST) $(ARGS)

test-kernel: MESHBPF_NO_SKIP := 1
test-kernel: setup $(VENV)/.test ## the kernel tests; what would be skipped fails
	@$(PROVISION) test
	$(PYTEST) -m kernel $(ARGS)

unit: $(VENV)/.test ## the tests without root
	$(PY) -m pytest tests/unit $(ARGS)

golden: $(VENV)/.test ## what commands print, as tests/unit/test_golden.py holds it, written anew
	$(PY) -m tests.unit.test_golden

check: $(VENV)/.test ## format, lint, types, generated files, links: no root
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict
	$(if $(C_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES))
	$(PY) -m loader.header --check
	$(PY) tests/tools/links.py

fmt: $(VENV)/.test ## format and mend what can be mended
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(C_FILES),$(VENV)/bin/clang-format -i $(C_FILES))

abi: $(VENV)/.run ## bpf/abi.h from loader/abi.py
	$(PY) -m loader.header --write

test-vm: $(VENV)/.made ## attach, call, detach on kernels 5.10, 6.1 and 6.12 (ARGS='6.1' narrows)
	@$(PROVISION) vm
	$(SUDO) vagrant/test-vm.sh $(ARGS)

bench: setup $(VENV)/.bench ## the figures of docs, measured here (QUICK=1: under 2 minutes)
	@$(PROVISION) bench
	$(SUDO) $(PY) -m bench $(if $(QUICK),--quick) $(ARGS)

soak: setup ## load and change for SOAK_MINUTES (60), and nothing left behind
	$(SUDO) $(PY) -m bench.soak $(if $(SOAK_MINUTES),--minutes $(SOAK_MINUTES)) $(ARGS)

clean: ## everything that was made here
	rm -rf $(VENV) vagrant/.cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The distribution's Python, because bcc lives in it. No root here: only a machine that cannot make an environment is provisioned.
$(VENV)/.made:
	@/usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || $(PROVISION) run
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.made
	$(PIP) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.run
	$(PIP) --editable '.[$*]'
	@touch $@
