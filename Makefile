# `make help` lists the targets. Works with GNU Make 3.81 (macOS) and newer.
PYTHON ?= python3
VENV := .venv/bin/python
PYTEST := $(VENV) -m pytest
# Two processes, one thread each: more threads are slower on models this small.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint format types unit parity host browser hosts workflows screenshots pictures miniature evidence bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: ## make .venv, fetch ComfyUI into .host unless there is one (COMFYUI_PATH)
	@$(PYTHON) -m scripts.setup

demo: setup ## what image prompts do, in a real ComfyUI; leaves demo/contact_sheet.png
	@$(VENV) -m scripts.demo

# Each part is a process of its own: the host tests import a whole ComfyUI, which the others must not see.
test: setup lint types unit parity host browser ## everything that needs no GPU

lint: setup ## ruff: rules and format
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

format: setup ## ruff: mend what can be mended, then format
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

types: setup ## mypy --strict on the library
	$(VENV) -m mypy

unit: setup ## the library alone
	$(PARALLEL) -m "not parity and not host and not browser"

parity: setup ## against reference implementations
	$(PARALLEL) -m parity

host: setup ## against the real ComfyUI
	$(PARALLEL) -m "host and not parity and not browser"

browser: setup ## the host's page in Chromium; skipped without one
	$(PYTEST) -m browser

hosts: setup ## slow: the host tests against older ComfyUIs
	$(VENV) -m scripts.host install 2.0.0
	$(VENV) -m scripts.host install 1.0.0
	COMFYUI_PATH=.host/ComfyUI-0.18.2 $(PARALLEL) -m "host and not browser"
	COMFYUI_PATH=.host/ComfyUI-0.16.3 $(PARALLEL) -m "host and not browser"

workflows: setup ## write workflows/ anew
	$(VENV) -m scripts.workflows

screenshots: setup ## take the pictures of the front end: the first template, every node
	$(VENV) -m scripts.screenshots
	$(VENV) -m scripts.screenshots nodes

pictures: setup ## make the documentation's other pictures, and the templates' thumbnails, anew
	$(VENV) -m scripts.doc_pictures
	$(VENV) -m scripts.grids
	$(VENV) -m scripts.inspecting
	$(VENV) -m scripts.maps
	$(VENV) -m scripts.thumbnails

miniature: setup ## slow: train the parts of the miniature that are not there; all take two hours
	$(VENV) -m miniature

evidence: setup ## slow: measure what the miniature does: docs/evidence.md with its pictures
	OMP_NUM_THREADS=1 $(VENV) -m miniature.evidence

bench: setup ## slow: measure what image prompts cost; writes docs/performance.md
	$(VENV) -m ip_adapter.bench all --page

clean: ## remove caches and the demo's output; .venv and .host stay
	rm -rf demo test-artifacts htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .host/base
	find . -name __pycache__ -not -path './.venv/*' -not -path './.host/*' -prune -exec rm -rf {} +
