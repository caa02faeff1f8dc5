# Short targets; each can be run again at any time. `make help` lists them.
#   make up DATA=my-images PRESET=quick MODEL=name

.DEFAULT_GOAL := help
.PHONY: FORCE help up down programs test drill nodes bench lint audit train rollout rollback rayservice image push
SHELL := /bin/bash
BIN := .venv/bin
# What .venv is for: auto is gpu where there is one, else what .venv has already, else cpu.
DEVICE_FOR_VENV := $(or $(filter auto cpu gpu,$(value DEVICE)),$(if $(value DEVICE),$(error DEVICE is auto, cpu or gpu),auto))
# The stamp of an older checkout is empty: all was installed then.
HAS := $(shell [ ! -f .venv/.installed ] || head -n 1 .venv/.installed | grep . || echo gpu)
WANTED := $(if $(filter auto,$(DEVICE_FOR_VENV)),$(shell \
  if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo $(or $(HAS),cpu); fi),$(DEVICE_FOR_VENV))
STALE := $(shell place=$$(sed -n 2p .venv/.installed 2>/dev/null); \
  [ "$(HAS)" = $(WANTED) ] && [ "$${place:-$$(readlink -f .venv)}" = "$$(readlink -f .venv)" ] || echo yes)
# What CI may be told by others (WHY, VERSION, …) stays in the shell: make would run what is in it.
# Settings of the line of this folder, unless the shell has those of another one.
# RAYLINE_MODEL of the shell goes before the model that the line was brought up with last.
LINE := [ -n "$$RAYLINE_STORAGE" ] || [ ! -f .rayline/env ] || \
  { model="$$RAYLINE_MODEL"; . .rayline/env; export RAYLINE_MODEL="$${model:-$$RAYLINE_MODEL}"; }

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/'

up: .venv/.installed ## bring the whole line up: DATA=folder, PRESET=smoke|quick|full, MODEL=name, DEVICE=cpu|gpu
	@$(BIN)/python -m jobs.up $(if $(DATA),--data "$(DATA)") $(if $(PRESET),--preset "$(PRESET)") \
	  $(if $(MODEL),--model "$(MODEL)")

down: .venv/.installed ## end everything that `make up` started; models, data and runs stay
	@$(BIN)/python -m jobs.down

programs: .venv/.installed
	@$(BIN)/python -m tests.programs

test: programs lint ## all tests: unit, integration, end to end; installs the system packages that they need
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

drill: programs lint ## what takes minutes a test: rollouts, kills in the middle of a sweep, Katib files
	@$(BIN)/python -m pytest -m long

nodes: programs ## as root: the line on three nodes and servers on this machine, and their loss
	@$(BIN)/python -m pytest -m long tests/cluster

lint: .venv/.installed ## what CI checks before the tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m mypy

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
# DEVICE=cpu takes torch from PyTorch's own index, without CUDA. Where that can't be reached, PyPI's
# torch loads most of CUDA's libraries when it is imported, on a CPU too: only those that it does not
# link are left out then (1.2 GB). The first line of .installed is the device, the second the place
# of .venv, whose scripts name it.
.venv/.installed: requirements.txt $(if $(STALE),FORCE)
	@set -e -o pipefail; \
	for python in python3.11 python3.12 python3.13 python3; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if $$python -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	  bare="$${bare:-$$($$python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')}"; \
	done; \
	if [ -z "$$found$$bare" ]; then echo "Rayline needs Python 3.11: install python3.11 and python3.11-venv"; exit 1; fi; \
	if [ -z "$$found" ]; then echo "$$bare has no ensurepip, which .venv needs: install the package $$bare-venv"; exit 1; fi; \
	version=$$($$found --version); \
	case "$$version" in "Python 3.11."*) ;; *) echo "Rayline is tested with Python 3.11 only: install it if something fails with $$version" ;; esac; \
	echo "setting up .venv with $$version for DEVICE=$(WANTED): takes some GB and a minute or two the first time"; \
	if [ -f .venv/.installed ]; then \
	  before=$$(head -n 1 .venv/.installed); old=$$(sed -n 2p .venv/.installed); new=$$(readlink -f .venv); \
	  [ "$${before:-gpu}" = $(WANTED) ] || again="--reinstall-package torch --reinstall-package torchvision"; \
	  if [ -n "$$old" ] && [ "$$old" != "$$new" ]; then \
	    { grep -lIF "$$old/bin/python" .venv/bin/* || true; } | while IFS= read -r script; do \
	      sed -i "1,3s|$$old/bin/python|$$new/bin/python|" "$$script"; \
	    done; \
	  fi; \
	fi; \
	$$found -m venv .venv; \
	rm -f $@; \
	uv=$$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.txt); \
	install() { \
	  VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --compile-bytecode --no-deps $$again "$$@" -r .venv/pins.txt 2>&1 \
	    | sed -u '/^ [-+~] /d'; \
	}; \
	done=; \
	if ! $(BIN)/python -m pip install -q --disable-pip-version-check "$$uv"; then :; \
	elif [ $(WANTED) = cpu ]; then \
	  grep -Ev '^(nvidia-|cuda-|triton==)' requirements.txt > .venv/pins.txt; \
	  if install --torch-backend cpu; then done=1; else \
	    echo "PyTorch's index of builds without CUDA gave no torch; taking PyPI's, 3 GB larger"; \
	    grep -Ev '^(cuda-|triton==|nvidia-(cusolver|nvtx)==)' requirements.txt > .venv/pins.txt; \
	    if install; then done=1; fi; \
	  fi; \
	else \
	  cp requirements.txt .venv/pins.txt; \
	  if install; then done=1; fi; \
	fi; \
	if [ -z "$$done" ]; then \
	  echo "uv could not install the pins; trying pip, which takes some minutes longer"; \
	  cp requirements.txt .venv/pins.txt; \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-deps -r .venv/pins.txt; \
	fi; \
	printf '%s\n%s\n' $(WANTED) "$$(readlink -f .venv)" > $@
