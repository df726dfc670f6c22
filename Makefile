# `make demo` and `make test` are the two habits to learn; the rest serves them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
UV_VERSION := 0.13.9
UV ?= $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := $(UV) run --frozen --all-extras --all-groups --no-sync

.PHONY: help demo up down check format generate test test-unit test-local test-cluster kubernetes bench bench-overhead

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.uv/bin/uv:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on PATH; install Python 3.11 or newer, or say PYTHON=<path>" >&2; exit 2; }
	@echo "uv is not installed: fetching uv $(UV_VERSION) into .uv (a few seconds)"
	@$(PYTHON) -m venv .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.synced: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	@echo "making the locked environment in .venv (about half a minute with an empty cache)"
	@$(UV) sync --frozen --all-extras --all-groups
	@touch $@

demo: .venv/.synced ## Stand up the local stack, run the scenarios on real inference, print their answers
	@$(RUN) llmtrace demo

up: .venv/.synced ## Stand up the local stack only
	@$(RUN) llmtrace up

down: .venv/.synced ## Stop the local stack
	@$(RUN) llmtrace down

format: .venv/.synced ## Format the code
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

generate: .venv/.synced ## Write what follows from the registry of names and from grafana/: constants, docs/reference.md, dashboards
	$(RUN) python -m llmtrace.semconv.generate
	$(RUN) python -m grafana.generate

check: .venv/.synced ## Lint, types, playbooks, shell (no stack needed)
	scripts/check

test-unit: .venv/.synced ## Unit and contract tests only (seconds)
	$(RUN) pytest tests/unit tests/contract

kubernetes: .venv/.synced ## Build the control plane that tests run (etcd, kube-apiserver, kube-controller-manager), and helm (minutes, once)
	@$(RUN) ansible-playbook playbooks/kubernetes.yml

test-local: kubernetes ## Tests against the real local stack (stands it up first)
	$(RUN) llmtrace up
	$(RUN) pytest tests/local

test: check kubernetes ## Everything that CI runs
	$(RUN) llmtrace up
	$(RUN) pytest tests --ignore=tests/cluster

test-cluster: .venv/.synced ## Tests on a cluster of three machines, which are made for it (root; needs what `make demo` installs)
	$(RUN) pytest tests/cluster -x

bench: .venv/.synced ## Benchmarks: ratios measured side by side in one run
	$(RUN) python -m bench

bench-overhead: .venv/.synced ## What tracing costs a model server: about an hour on an idle machine (needs what `make up` installs)
	$(RUN) python -m bench.overhead
