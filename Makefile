PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# The tests of what other libraries change: torch.compile, and their models and trainers.
OLDEST_FAST := ops/test_compile ops/test_dora_linear models/test_apply peft/test_patch peft/test_acts peft/test_files
REHEARSAL := tests/bench/day_rehearsal.py tests/bench/day_compiles_ahead.py

.PHONY: demo test scorecard scorecard-fast oldest oldest-fast lint wheel offline rehearse peft-suite peft-suite-kernels clean

demo: $(VENV)/.installed  ## fine-tune the embedded model on the embedded data
	$(BIN)/python -m training

test: $(VENV)/.installed  ## run the tests; kernels run under Triton's interpreter where there is no GPU
	$(BIN)/python -m pytest -n 2

scorecard: $(VENV)/.peft-suite  ## measure the reliability scorecard and write tests/SCORECARD.md; hours, resumable
	$(BIN)/python -m tests.scorecard --write

scorecard-fast: $(VENV)/.installed  ## measure the rows of the scorecard that take seconds
	$(BIN)/python -m tests.scorecard --fast

oldest: $(OLDEST)/.installed  ## run the tests, the day's rehearsal and the kernels' compilation with the oldest versions; fetches 3 GB
	$(OLDEST)/bin/python -m pytest -n 2
	$(OLDEST)/bin/python -m pytest -n 0 $(REHEARSAL)
	$(OLDEST)/bin/python -m bench offline --check

oldest-fast: $(OLDEST)/.installed  ## run the tests that depend most on the versions of other libraries
	$(OLDEST)/bin/python -m pytest -n 2 $(OLDEST_FAST:%=tests/%.py)

lint: $(VENV)/.installed  ## check style, formatting, and the types that users see
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.doc_blocks build/doc_blocks
	$(BIN)/mypy

wheel: $(VENV)/.installed  ## build the sdist and from it the wheel; try the wheel outside the clone
	rm -rf build/wheel
	$(BIN)/python -m build --outdir build/wheel/dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --no-deps build/wheel/dist/*.whl
	# The requirements are those of the tests' environment; its editable install is not seen through a .pth file.
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(build/wheel/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/requirements.pth"
	cd build/wheel && venv/bin/python ../../tests/support/installed.py wheel ../..

offline: $(VENV)/.installed  ## compile every kernel for every supported GPU and compare with the golden files
	$(BIN)/python -m bench offline --check
	$(BIN)/python -m pytest -n 0 tests/bench/committed_predictions.py

rehearse: $(VENV)/.installed  ## run a day of benchmarks on a CPU that stands in for a GPU, killed once on the way
	$(BIN)/python -m pytest -n 0 $(REHEARSAL)

peft-suite: $(VENV)/.peft-suite  ## run PEFT's own DoRA tests with the engine in them, and train diffusers' models; fetches PEFT's sources
	$(BIN)/python -m tests.peft_suite build/peft-suite --engines reference
	$(BIN)/python -m pytest -n 0 tests/peft_suite/diffusers_training.py

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

$(OLDEST)/.installed: requirements-oldest.txt setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pip install --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) out build
