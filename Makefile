PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test scorecard scorecard-fast lint offline peft-suite peft-suite-kernels clean

demo: $(VENV)/.installed  ## fine-tune the embedded model on the embedded data
	$(BIN)/python -m training

test: $(VENV)/.installed  ## run the tests; kernels run under Triton's interpreter where there is no GPU
	$(BIN)/python -m pytest -n 2

scorecard: $(VENV)/.peft-suite  ## measure the reliability scorecard and write tests/SCORECARD.md; hours, resumable
	$(BIN)/python -m tests.scorecard --write

scorecard-fast: $(VENV)/.installed  ## measure the rows of the scorecard that take seconds
	$(BIN)/python -m tests.scorecard --fast

lint: $(VENV)/.installed  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

offline: $(VENV)/.installed  ## compile every kernel for every supported GPU and compare with the golden file
	$(BIN)/python -m bench offline --check

peft-suite: $(VENV)/.peft-suite  ## run PEFT's own DoRA tests with the engine in them; fetches their source distribution
	$(BIN)/python -m tests.peft_suite build/peft-suite --engines reference

peft-suite-kernels: $(VENV)/.peft-suite  ## the same with the kernels under Triton's interpreter, which takes longer
	$(BIN)/python -m tests.peft_suite build/peft-suite --engines triton

$(VENV)/.peft-suite: $(VENV)/.installed
	$(BIN)/python -m pip install attrs diffusers scipy parameterized pillow  # what PEFT's tests import
	touch $@

$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) out build
