# Two virtual environments are never needed: .venv grows from `make demo` to `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

# One thread per process: threads that wait for each other collapse on a busy machine.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test slow exhaustive cluster lint docs bench stubs clean

demo: $(VENV)/ready
	$(BIN)/eckart demo

test: $(VENV)/ready-test
	$(BIN)/python -m pytest -n $(WORKERS)

slow: $(VENV)/ready-test
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

exhaustive: $(VENV)/ready-test
	$(BIN)/python -m pytest -n $(WORKERS) -m exhaustive

cluster: $(VENV)/ready-cluster
	$(BIN)/python -m pytest -m cluster

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

docs: $(VENV)/ready-test
	$(BIN)/python -m mkdocs build --quiet

bench: $(VENV)/ready-test
	$(BIN)/python -m pip install --quiet --no-deps galore-torch==1.0 # a peer; its own needs are not ours
	@for file in $(filter-out benchmarks/pairs.py benchmarks/counting.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file || exit 1; done

stubs: $(VENV)/ready
	$(BIN)/python -m eckart.recipe.registry > src/eckart/methods/__init__.pyi

clean:
	rm -rf $(VENV)

# torch comes first and by itself, so that the build chosen for it (CPU or CUDA) stays.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/ready-cluster: $(VENV)/ready-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,sweeps]'
	touch $@
