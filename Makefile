# make demo: the whole path on this machine.  make quick, make test, make test-slow: tests by length.
# make check: lint, format, types.  make docs: the documentation.  make bench: the benchmarks.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo quick test test-slow check docs bench format lock clean

# The stamp is newer than the lock once everything in it is installed: until the lock changes,
# setup costs nothing.
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) is not on this machine: install Python 3.11," \
			"or name one that is (make PYTHON=python3)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

demo: setup
	$(RUN) -m cluster demo

# Two pytest processes share the files in the order of tests/support/groups.py.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Tests that start no Ray, no other process and no browser, on two cores (tests/support/marks.py).
quick: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not ray and not slow" $(PARALLEL) --quiet

# Bytecode is kept, because the tests start some hundreds of Python processes.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL) \
		--cov --cov-report=term:skip-covered --durations=25 --durations-min=5

test-slow: setup
	$(RUN) -m pytest -m slow

# The studio page is checked by Biome (.biome.jsonc), which npx downloads once. A machine without
# node or without a network skips this check.
BIOME := npx --yes --prefer-offline --fetch-retries=0 @biomejs/biome@2.6.8
define biome
@if ! command -v npx >/dev/null; then \
	echo "skipped the check of serve/page: node is not installed"; \
elif ! $(BIOME) --version >/dev/null 2>&1; then \
	echo "skipped the check of serve/page: npx cannot fetch Biome"; \
else \
	$(BIOME) $(1) --error-on-warnings serve/page; \
fi
endef

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(call biome,check)
	$(VENV)/bin/mypy

# Links, navigation and docstrings are checked: a warning is an error. No network is used.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file .mkdocs.yml

# Without NAME: the list.  make bench NAME=serve_text ARGS="--rounds 4": one of them.
bench: setup
ifdef NAME
	$(RUN) -m benchmarks.$(NAME) $(ARGS)
else
	@for file in $$(grep -l '^if __name__' benchmarks/*.py); do \
		printf '%-20s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/"""//gp' $$file)"; done
endif

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(call biome,check --write)

# The newest versions that pyproject.toml allows, for every platform, exactly.
lock: setup
	$(VENV)/bin/uv pip compile --universal --python-version 3.11 pyproject.toml --extra dev \
		--no-annotate --no-header --quiet --upgrade --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage site
