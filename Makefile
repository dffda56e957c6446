# make demo and make test need Python >= 3.11, a C++ compiler and a package index; everything else they bring themselves
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := runs/demo
QUICK  ?=
# processes that share the tests, each with whole files; 0 runs them all in one
JOBS   ?= 2
ifneq ($(QUICK),)
QUICK_OPTIONS := --train.max_steps 8 --stream.options '{num_train: 288, num_test: 32}'
endif

# a thread that waits for another spins for some microseconds only, then gives its core away to what else is running
export GOMP_SPINCOUNT ?= 3000

.PHONY: env demo test lint sanitize bench clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy ninja pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[triton,pocket,signs,test,bench]"
	touch $@

demo: env
	$(BIN)/mllmcl run examples/demo/lora.yaml $(QUICK_OPTIONS) --train.output_dir $(RUNS)$(QUICK)/lora
	$(BIN)/mllmcl run examples/demo/mr_lora.yaml $(QUICK_OPTIONS) --train.output_dir $(RUNS)$(QUICK)/mr_lora
	$(BIN)/mllmcl report $(RUNS)$(QUICK)/lora $(RUNS)$(QUICK)/mr_lora

test: env
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the C++ library with address and undefined-behaviour sanitizers, in a tree of its own, under the tests of every op
sanitize: env
	rm -rf build/sanitize && mkdir -p build/sanitize && git ls-files -z | xargs -0 cp --parents -t build/sanitize
	cd build/sanitize && MLLMCL_SANITIZE=1 MLLMCL_CUDA=0 ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))" \
	../../$(BIN)/python -m pytest -q -x -s -p no:cacheprovider tests/ops/test_registry.py tests/ops/test_route.py \
	tests/ops/test_masks.py tests/ops/test_ema_update.py tests/ops/test_lists.py tests/ops/test_penalties.py -k "not triton and not opcheck and not gradcheck"

# peers wake their threads more often, and would pay for short spinning
bench: env
	env -u GOMP_SPINCOUNT $(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf build dist *.egg-info mllmcl_kernels/*.so mllmcl_kernels/build.json $(VENV)/.ready
