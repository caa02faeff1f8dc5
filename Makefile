# Short targets; each can be run again at any time. `make help` lists them.
#   make up DATA=my-images PRESET=quick MODEL=name

.DEFAULT_GOAL := help
.PHONY: help up down programs test drill nodes bench lint audit train rollout rollback rayservice image push
SHELL := /bin/bash
BIN := .venv/bin
# What CI may be told by others (WHY, VERSION, …) stays in the shell: make would run what is in it.
# Settings of the line of this folder, unless the shell has those of another one.
# RAYLINE_MODEL of the shell goes before the model that the line was brought up with last.
LINE := [ -n "$$RAYLINE_STORAGE" ] || [ ! -f .rayline/env ] || \
  { model="$$RAYLINE_MODEL"; . .rayline/env; export RAYLINE_MODEL="$${model:-$$RAYLINE_MODEL}"; }

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/'

up: .venv/.installed ## bring the whole line up: DATA=folder, PRESET=smoke|quick|full, MODEL=name
	@$(BIN)/python -m jobs.up $(if $(DATA),--data "$(DATA)") $(if $(PRESET),--preset "$(PRESET)") \
	  $(if $(MODEL),--model "$(MODEL)")

down: .venv/.installed ## end everything that `make up` started; models, data and runs stay
	@$(BIN)/python -m jobs.down

programs: .venv/.installed
	@$(BIN)/python -m tests.programs

test: programs lint ## all tests: unit, integration, end to end; installs the system packages that they need
	@$(BIN)/python -m pytest

drill: programs lint ## what takes minutes a test: rollouts, kills in the middle of a sweep, Katib files
	@$(BIN)/python -m pytest -m long

nodes: programs ## as root: the line on three nodes and servers on this machine, and their loss
	@$(BIN)/python -m pytest -m long tests/cluster

lint: .venv/.installed ## what CI checks before the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: .venv/.installed ## known weaknesses of the pins, and whether the pins are whole
	@$(BIN)/python deploy/audit.py

train: .venv/.installed ## like up, but nothing that is served changes; report in .rayline/report.md
	@$(BIN)/python -m jobs.up --no-deploy $${DATA:+--data "$$DATA"} \
	  $${PRESET:+--preset "$$PRESET"} $${MODEL:+--model "$$MODEL"}

rollout: .venv/.installed ## VERSION=number step by step to all of the traffic, or back by itself
	@$(LINE); $(BIN)/python -m jobs.rollout "$${VERSION:?give VERSION=number}"

rollback: .venv/.installed ## back to the champion before; WHY=reason
	@$(LINE); $(BIN)/python -m jobs.deploy --why "$${WHY:-make rollback}" rollback

rayservice: .venv/.installed ## Kubernetes: the RayService asks for what is live now
	@$(LINE); kubectl -n rayline patch rayservice rayline-serve --type merge \
	  -p "$$($(BIN)/python -m jobs.serve_config | tail -n 1)"

image: ## the container image, DEVICE=cpu|gpu
	@docker build -f deploy/Dockerfile -t "rayline:$${DEVICE:-cpu}" \
	  --build-arg DEVICE="$${DEVICE:-cpu}" \
	  --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" .

push: ## that image as REGISTRY/rayline:TAG-DEVICE; a TAG v0.2.0 is written 0.2.0
	@tag="$${TAG:?give TAG=v0.2.0}"; image="$${REGISTRY:?give REGISTRY=ghcr.io/me}"; \
	  image="$${image,,}/rayline:$${tag#v}-$${DEVICE:-cpu}"; \
	  docker tag "rayline:$${DEVICE:-cpu}" "$$image" && docker push "$$image"

bench: programs ## tables of ingest, training, search and serving, with peers beside
	@$(BIN)/python -m tests.bench

# uv installs the pins in a sixth of pip's time; pip is there when uv can't run on a machine. Where
# nothing may write bytecode later (PYTHONDONTWRITEBYTECODE), each process of Ray that starts would
# take three times as long without it.
.venv/.installed: requirements.txt
	@set -e -o pipefail; \
	for python in python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then echo "Rayline needs Python 3.11 or newer: install python3.11"; exit 1; fi; \
	echo "setting up .venv with $$($$found --version): takes some GB and a minute or two the first time"; \
	$$found -m venv .venv; \
	uv=$$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.txt); \
	if $(BIN)/python -m pip install -q --disable-pip-version-check "$$uv" \
	    && VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --compile-bytecode --no-deps -r requirements.txt 2>&1 \
	    | grep --line-buffered -v '^ [+-] '; then :; else \
	  echo "uv could not install the pins; trying pip, which takes some minutes longer"; \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements.txt; \
	fi; \
	touch $@
