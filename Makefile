# `make demo` and `make test` need Python >= 3.10 and a C++ compiler; they set up everything else in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is not imported need not be compiled to bytecode: most of torch, SciPy and SymPy.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
TOOLS := triton pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis ruff clang-format 'pyright[nodejs]'
GROUPS ?=
STEPS ?=
TIME_LIMIT ?= 540
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test build bench lint format gpu sanitize clean

# The torch already installed when it is 2.10 or later (through a .pth file), else the pinned one.
$(VENV)/.environment: constraints.txt tools/link_torch.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PYTHON) tools/link_torch.py $(VENV) || $(PIP) torch==2.13.0
	$(PIP) setuptools wheel ninja pybind11 numpy
	touch $@

$(VENV)/.built: $(VENV)/.environment $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.tools: $(VENV)/.built
	$(PIP) $(TOOLS)
	$(PIP) --ignore-installed --no-deps clang-format
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/adaselect demo

# Two processes: Triton decides when it is imported whether kernels are compiled or interpreted.
test: export ADASELECT_REQUIRE_EXTENSION := 1
test: $(VENV)/.tools
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/test_triton_kernels.py tests/test_triton_grad_norms.py \
		tests/samplers/test_triton_bank.py tests/linear/test_triton_losses.py tests/linear/test_triton_linear.py

lint: $(VENV)/.tools
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/.tools
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: $(VENV)/.tools
	$(BIN)/python -m benchmarks run --device cpu --time-limit 1500
	$(BIN)/python -m benchmarks report

# On a machine with a GPU, which may have no network: uses the Python, torch and compilers found there.
gpu:
	$(PYTHON) -m benchmarks gpu --groups "$(GROUPS)" --steps "$(STEPS)" --time-limit $(TIME_LIMIT)

# The operator tests on C++ built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
SANITIZED := build/sanitized
sanitize: $(VENV)/.tools
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r adaselect_kernels csrc tests benchmarks setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/adaselect_kernels/*.so
	cd $(SANITIZED) && ADASELECT_SANITIZE=address,undefined ADASELECT_REQUIRE_EXTENSION=1 \
		$(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ADASELECT_REQUIRE_EXTENSION=1 \
		$(CURDIR)/$(BIN)/python -m pytest tests/test_cpu_*.py tests/test_functional.py

clean:
	rm -rf build dist *.egg-info adaselect_kernels/*.so $(VENV)
