# `make demo` and `make test` set everything up by themselves on a machine with Python and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MODELS := .venv/.models

.PHONY: demo test lint types unit docs timm bench clean

demo: $(READY)
	mkdir -p out
	$(BIN)/vicinal demo --out out/demo.png

test: lint types unit

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(MODELS)
	$(BIN)/pyright

# One thread a worker: with more, two workers on two cores spend their time waiting for each other.
unit: $(MODELS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

# The page of public names, from the docstrings.
docs: $(MODELS)
	$(BIN)/python docs/api.py

# timm's models need torchvision, which needs a torch of its own: an environment apart, several gigabytes.
timm: .venv-timm/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=src .venv-timm/bin/python -m pytest -q tests/integrations/test_timm.py tests/test_models.py

bench: $(READY)
	$(BIN)/vicinal bench --suite cpu

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

# Libraries of models, which only the tests of their integrations need.
$(MODELS): $(READY) requirements-models.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-models.txt
	touch $(MODELS)

.venv-timm/.ready: requirements-timm.txt
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-timm.txt
	touch .venv-timm/.ready

clean:
	rm -rf .venv .venv-timm out dist build .pytest_cache .hypothesis .ruff_cache
