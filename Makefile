# Everything a fresh machine needs: `make demo` runs the main job, `make test` passes the tests.
# Each target that needs the environment creates it first; a changed pyproject or constraints file renews it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install system browser demo demo-mopd test test-slow test-vllm test-sglang test-verl lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with everything that development needs

# Bubblewrap isolates sandboxes; the browser looks at the reports. Tests that need one skip with a reason without it.
SYSTEM_PACKAGES := bubblewrap
BROWSER_PACKAGES := chromium fonts-dejavu-core
define install-system
	@missing=$$(for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing \
	      >/dev/null; \
	  else echo "not installed, and this user may not install it: $$missing"; fi; fi
endef

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

system: ## system packages that tests use
	$(call install-system,$(SYSTEM_PACKAGES))

browser: ## the browser that looks at the reports
	$(call install-system,$(BROWSER_PACKAGES))

demo: $(STAMP) ## the main job: rollouts in workers that are killed, five ways of coping, one report
	$(BIN)/rollout-wal demo --out out/demo

demo-mopd: $(STAMP) ## two teachers, one student, everything is killed; about ten minutes
	$(BIN)/rollout-wal demo-mopd --out out/mopd

test: $(STAMP) system ## the test suite
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu" tests

test-slow: $(STAMP) system browser ## the long tests: more kills, more schedules, a browser
	$(BIN)/python -m pytest -n $(JOBS) -m "slow and not gpu" tests

# Environments of their own, for what pins its own torch. Each is made anew when its list changes.
env-%:
	PYTHON=$(PYTHON) sh scripts/install_$*.sh

test-vllm: system env-vllm ## the tests inside the real vLLM engine, on a CPU; an environment of their own
	.venv-vllm/bin/python -m pytest -m "not slow" tests_vllm

test-sglang: system env-sglang ## the tests inside the real SGLang engine, on a CPU; an environment of their own
	OMP_NUM_THREADS=1 .venv-sglang/bin/python -m pytest -m "not slow" tests_sglang

test-verl: env-verl ## the tests inside the real verl, with Ray, on a CPU; an environment of their own
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -m "not slow" tests_verl

lint: $(STAMP) ## ruff, mypy --strict, import contracts, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	cd proto && ../$(BIN)/buf lint

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## every benchmark, quickly; results under out/bench
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	mkdir -p out/bench
	for name in $$(ls benchmarks/*.py | xargs -n1 basename | sed 's/\.py$$//' | grep -v '^_\|_overhead$$\|^mopd$$' ; echo engine_overhead); do \
	  $(BIN)/python -m benchmarks.$$name --quick --json out/bench/$$name.json || exit 1; done

clean: ## remove the environment and all outputs
	rm -rf $(VENV) .venv-vllm .venv-sglang .venv-verl out .mypy_cache .ruff_cache .pytest_cache .hypothesis
