# Two commands: `make lab` opens the book, `make test` checks all of it.
# One thread for each worker: reproducible, and far faster than two on a busy machine.
PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: lab test unit notebooks book refresh clean

lab: .venv/ready
	@echo "JupyterLab serves notebooks/. The address is printed below; a browser opens if there is one."
	HF_HUB_OFFLINE=0 $(BIN)/jupyter lab --notebook-dir=notebooks $(ROOT) $(LAB)

test: unit notebooks

unit: .venv/ready
	$(BIN)/python -m pytest -q tests -n $(WORKERS) --dist loadfile -p no:cacheprovider

# On a CPU the stored outputs are compared; elsewhere (make notebooks NBVAL=--nbval-lax) asserts hold.
NBVAL ?= --nbval
notebooks: .venv/ready
	$(BIN)/python -m pytest -q $(NBVAL) --nbval-current-env --nbval-cell-timeout=300 \
	    notebooks -n $(WORKERS) --dist loadscope -p no:cacheprovider

book: .venv/ready
	mkdir -p build
	$(BIN)/jupyter nbconvert --to html --execute --ExecutePreprocessor.timeout=600 \
	    --output-dir build notebooks/[0-9]*.ipynb

refresh: .venv/ready
	$(BIN)/python tests/refresh.py $(or $(ONLY),$(wildcard notebooks/[0-9]*.ipynb notebooks/solutions/[0-9]*.ipynb))

# Made once, and again only when the list of packages changes.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[book,oracles]"
	touch $@

clean:
	rm -rf .venv build runs
