# Requires Python 3.10+ with pip. Each target installs what it needs and can be run repeatedly.
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?=
NANO_ARGS ?=
COPRS_NANO_ARGS ?=
DEMO_ARGS ?=
APP_ARGS ?=
WEB_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo web app docs test test-heavy test-vllm lint format bench nano mini coprs-nano dev clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-core  ## segment the first ConceptShapes test samples; images go to demo_output/
	@$(VENV)/bin/conceptseg demo $(DEMO_ARGS)

web: $(VENV)/.installed-web  ## open the browser demo on this machine (conceptseg app)
	@$(VENV)/bin/conceptseg app $(WEB_ARGS)

app: $(VENV)/.installed-app  ## open the FiftyOne App on ConceptShapes with the plugin; all files go to fiftyone_app/
	@$(VENV)/bin/python -m conceptseg_hf.integrations.fiftyone_app $(APP_ARGS)

test: $(VENV)/.installed-test  ## run the tests (PYTEST_ARGS="-m 'not slow'" skips slow tests)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not heavy" $(PYTEST_ARGS)

test-heavy: $(VENV)/.installed-test  ## run the long tests that `make test` leaves out: installation, distributed and small full trainings, FiftyOne's App
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m heavy $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.installed-vllm  ## run the tests that need vLLM, in an environment of its own (Linux, Python 3.11)
	$(VLLM_VENV)/bin/python -m pytest tests/with_vllm $(PYTEST_ARGS)

docs: $(VENV)/.installed-docs  ## build the site in build/site; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy

format: $(VENV)/.installed-lint  ## fix style and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-core  ## measure the time of imports, data, both routes, and FiftyOne operations if FiftyOne is installed
	$(VENV)/bin/python benchmarks/speed.py
	@if $(VENV)/bin/python -c 'import fiftyone' 2>/dev/null; then $(VENV)/bin/python benchmarks/fiftyone_loop.py; \
	else echo 'FiftyOne is not installed; skipping benchmarks/fiftyone_loop.py'; fi

nano: $(VENV)/.installed-core  ## train the embedded checkpoint from scratch (resumes after an interruption)
	$(VENV)/bin/python -m conceptseg_trainers.nano $(NANO_ARGS)

mini: $(VENV)/.installed-core  ## train the checkpoint for photographs from scratch: make mini MINI_ARGS="--root PHOTOS"
	$(VENV)/bin/python -m conceptseg_trainers.mini $(MINI_ARGS)

coprs-nano: $(VENV)/.installed-core  ## train the embedded CoPRS checkpoint from nano (resumes after an interruption)
	$(VENV)/bin/python -m conceptseg_trainers.coprs_nano $(COPRS_NANO_ARGS)

dev: $(VENV)/.installed-dev  ## install all development dependencies and the commit hooks
	$(VENV)/bin/pre-commit install

clean:  ## remove the environment, caches and output folders
	rm -rf $(VENV) $(VLLM_VENV) build dist demo_output fiftyone_app evaluation_output ablation_output comparison_output conceptseg_output trainer_output .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml constraints.txt .ci/setup
	@.ci/setup $(VENV) $*

$(VLLM_VENV)/.installed-vllm: pyproject.toml constraints.txt .ci/setup tests/with_vllm/requirements.txt
	@.ci/setup $(VLLM_VENV) vllm
