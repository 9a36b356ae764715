# `make help` lists the targets. Everything that is made stays inside the clone: .venv, .cache, build, out.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SETUP_STAMP := $(VENV)/.setup-stamp
ASAN_DIR := build/asan
PEERS_DIR := .cache/peers
PEERS := $(basename $(notdir $(wildcard benchmarks/speed_sides/requirements/*.txt)))

RUNTIME_SOURCES := $(shell find runtime -type f 2>/dev/null)
CPP_SOURCES := $(shell find runtime -type f \( -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.cpp' \) 2>/dev/null)

PYTEST_WORKERS ?= $(shell nproc)
PYTEST_ARGS ?=

define RUN_LINT
$(BIN)/ruff check
$(BIN)/mypy
$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))
endef
RUN_CPP_TESTS = $(BIN)/ctest --test-dir $(ASAN_DIR) --output-on-failure --no-tests=error
RUN_PYTHON_TESTS = $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# One thread per test process: pytest runs as many processes as there are cores.
test test-python test-page test-cross test-cross-onnx test-toolchains test-jni wheel-aarch64 update-golden: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup runtime asan data lint test fuzz test-cpp test-python test-page qemu test-cross test-cross-onnx test-toolchains test-jni test-amx wheel-aarch64 demo verify-zoo verify-edge verify-onnx bench-memory peers bench-speed bench-all bench-scaling bench-kernels bench-ablate bench-instructions bench-cycles sweep update-golden clean distclean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  make %-19s %s\n", $$1, $$2 }'

setup: $(SETUP_STAMP) ## Create .venv with all dependencies and the package, runtime included

# A Debian without python3-venv cannot put pip into a new environment; an outer pip can.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } \
	  || { echo "Cannot create $(VENV): install python3-venv (Debian: apt-get install python3.11-venv)." >&2; exit 1; }

# PyTorch comes first and alone, so that a later dependency never picks another version.
# The package is installed again when the runtime changes: that rebuilds the native library.
$(SETUP_STAMP): pyproject.toml $(filter-out runtime/test/%,$(RUNTIME_SOURCES)) | $(BIN)/python
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[torch,bench,onnxruntime,dev]"
	@touch $@

runtime: setup asan ## Build the native runtime, and again under ASan and UBSan in build/asan

asan: $(ASAN_DIR)/.stamp

$(ASAN_DIR)/.stamp: $(RUNTIME_SOURCES) | $(SETUP_STAMP)
	$(BIN)/cmake -S runtime -B $(ASAN_DIR) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPOCKC_SANITIZE=ON -DPOCKC_BUILD_TESTS=ON
	$(BIN)/cmake --build $(ASAN_DIR)
	@touch $@

data: setup ## Download weights and data sets into .cache/data (versions pinned, checksums verified)
	$(BIN)/python -m benchmarks.fetch

lint: setup ## Check Python with ruff and mypy, C++ with clang-format
	$(RUN_LINT)

test-cpp: asan ## Run the C++ tests under ASan and UBSan
	$(RUN_CPP_TESTS)

test-python: setup ## Run the Python tests
	$(RUN_PYTHON_TESTS)

# In this order in one process even under `make -j`, so that the last line is that of pytest.
test: setup asan ## Set up, lint, and run all C++ and Python tests
	$(RUN_LINT)
	$(RUN_CPP_TESTS)
	$(RUN_PYTHON_TESTS)

# Chromium is large, so `make test` takes the one that is there, and says so where there is none.
test-page: setup ## Test the memory page in headless Chromium, installed with apt-get where that is permitted
	command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_memory_page.py

# Only where it is permitted: the tests that need these programs are skipped without them, and say so.
qemu: ## Install qemu-user, and an ssh server and rsync to test with, by apt-get where that is permitted
	command -v qemu-aarch64 && command -v rsync && { command -v sshd || test -x /usr/sbin/sshd; } \
	  || apt-get install --yes --no-install-recommends qemu-user openssh-server rsync \
	  || { apt-get update && apt-get install --yes --no-install-recommends qemu-user openssh-server rsync; } \
	  || echo "Cannot install qemu-user, openssh-server and rsync here: what needs them is skipped."

# The first time, zig compiles its C++ library for each architecture: minutes each. All of it is kept in .cache/pockc.
# `halves`: programs with activations in 16 bits too, for which the runtime is compiled once more.
CROSS ?= aarch64,armv7l,riscv64,x86_64,halves
test-cross: setup qemu ## Cross-compile for other processors and test under emulation: CROSS=aarch64 for one of them
	POCKC_CROSS=$(CROSS) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/cross tests/test_deploy.py

# The emulator is compiled from the source of Debian's next release, without any change to the system.
test-amx: setup ## Multiply through AMX in an emulated computer that has it, under Debian's Linux
	POCKC_AMX=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/amx

# `make test` has the same test where a JDK is installed already.
test-jni: setup ## Test the Android binding in a JVM, installed with apt-get where that is permitted
	command -v javac || apt-get install --yes --no-install-recommends default-jdk-headless \
	  || echo "Cannot install default-jdk-headless here: the test of the binding is skipped."
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/native/test_jni.py

# Dynamically linked programs under emulation need the board's C library.
SYSROOT_PACKAGES := libc6-arm64-cross libstdc++6-arm64-cross
define GET_SYSROOT
test -e /usr/aarch64-linux-gnu/lib/libstdc++.so.6 || apt-get install --yes --no-install-recommends $(SYSROOT_PACKAGES) \
  || echo "Cannot install $(SYSROOT_PACKAGES) here: what needs them is skipped."
endef
ONNXRUNTIME := $(shell sed -n 's/.*"\(onnxruntime==[^"]*\)".*/\1/p' pyproject.toml)

test-cross-onnx: setup qemu ## Test the driver for ONNX Runtime on 64-bit ARM, with the library of the pip package, by emulation
	$(GET_SYSROOT)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 311 \
	  --platform manylinux_2_28_aarch64 --dest .cache/onnxruntime-aarch64 $(ONNXRUNTIME) \
	  || echo "Cannot download $(ONNXRUNTIME) for aarch64 here: what needs it is skipped."
	POCKC_CROSS=aarch64,onnxruntime $(BIN)/python -m pytest $(PYTEST_ARGS) tests/cross/test_onnxruntime.py

test-toolchains: setup qemu ## Cross-compile with Debian's g++ through a toolchain file, and libraries with zig; run them by emulation
	command -v aarch64-linux-gnu-g++ || apt-get install --yes --no-install-recommends g++-aarch64-linux-gnu \
	  || echo "Cannot install g++-aarch64-linux-gnu here: what needs it is skipped."
	$(GET_SYSROOT)
	POCKC_CROSS=aarch64,toolchains $(BIN)/python -m pytest $(PYTEST_ARGS) tests/cross/test_toolchains.py

# The library needs glibc 2.28 at most, and brings its C++ library. `pock-run` is dynamic here: zig has no static glibc.
WHEEL_TAG := py3-none-manylinux_2_28_aarch64
ZIG_TOOLCHAIN = $(BIN)/python -c 'from pockc.targets import devices; from pockc.targets.native import toolchain; \
  print(toolchain.for_device(devices.find("rpi4"), "zig", library=True).file)'

wheel-aarch64: setup qemu ## Make the Python wheel for 64-bit ARM Linux with zig, in dist/, and test its library under emulation
	$(GET_SYSROOT)
	$(BIN)/python -m pip wheel . --quiet --no-deps --wheel-dir dist -C wheel.tags=$(WHEEL_TAG) -C build-dir=build/wheels/$(WHEEL_TAG) \
	  -C cmake.define.CMAKE_TOOLCHAIN_FILE=$$($(ZIG_TOOLCHAIN)) -C cmake.define.POCKC_STATIC_LINK=OFF \
	  -C cmake.define.CMAKE_SHARED_LINKER_FLAGS=-s -C cmake.define.CMAKE_EXE_LINKER_FLAGS=-s -C install.strip=false
	POCKC_CROSS=aarch64,wheel $(BIN)/python -m pytest $(PYTEST_ARGS) tests/cross/test_wheel.py

FUZZ_SECONDS ?= 600
LIBFUZZER_PROBE = echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' \
  | clang++ -x c++ -fsanitize=fuzzer,address -o /dev/null - 2>/dev/null && echo libfuzzer || echo driver
FUZZ_WITH ?= $(shell $(LIBFUZZER_PROBE))

# The driver's programs are in the build of `make asan`; libFuzzer has one of its own, without vectorised kernels.
fuzz: setup ## Feed changed programs, checkpoints and archives to the readers for ten minutes (FUZZ_SECONDS; FUZZ_WITH=driver: no Clang)
	$(if $(filter driver,$(FUZZ_WITH)),$(MAKE) asan)
	sh runtime/fuzz/run.sh $(FUZZ_SECONDS) $(BIN)/python $(CURDIR)/$(BIN)/cmake $(CURDIR)/$(BIN)/ninja $(FUZZ_WITH)

demo: data ## Fine-tune a real model on real data with four schemes, and compare them
	$(BIN)/python -m benchmarks.demo

verify-zoo: data ## Compare every zoo model and scheme with PyTorch, step by step
	$(BIN)/python -m benchmarks.verify_zoo

verify-onnx: setup ## Compare models for ONNX Runtime with PyTorch: trajectories, and CPU time of a step
	$(BIN)/python -m benchmarks.verify_onnx

verify-edge: setup qemu ## Train three models for five processor cores under emulation, against this machine: a table
	$(BIN)/python -m benchmarks.verify_edge

bench-instructions: setup qemu ## Count the instructions of a step on 64-bit ARM by emulation: sparse against full, int8 with dot products, fp16
	status=0; for counts in instruction_counts instruction_counts_int8 instruction_counts_fp16; do \
	  $(BIN)/python -m benchmarks.$$counts || status=1; done; exit $$status

bench-cycles: setup qemu ## Model the cycles of a step on 64-bit ARM, kernel by kernel: emulation and llvm-mca
	command -v llvm-mca || apt-get install --yes --no-install-recommends llvm \
	  || { apt-get update && apt-get install --yes --no-install-recommends llvm; } || echo "Cannot install llvm here."
	$(BIN)/python -m benchmarks.cycle_model

# Everything that is measured is made from random weights: no data is needed.
bench-memory: setup ## Compare the memory of training with PyTorch's: tables, JSON, a picture
	$(BIN)/python -m benchmarks.memory

# Libraries that the speed benchmark compares with have environments of their own; see speed_sides/requirements.
peers: $(PEERS:%=$(PEERS_DIR)/%/.stamp) ## Install TensorFlow, JAX and other libraries to compare the speed with

$(PEERS_DIR)/%/.stamp: benchmarks/speed_sides/requirements/%.txt | $(SETUP_STAMP)
	rm -rf $(@D)
	mkdir -p $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --requirement $<
	$(if $(NEEDS_PYTORCH),$(BIN)/python $(SITE_PACKAGES) > "$$($(@D)/bin/python $(SITE_PACKAGES))/pytorch.pth")
	@touch $@

# They export models with PyTorch, that of .venv: what is not in their own environment is looked for there.
$(PEERS_DIR)/onnxruntime/.stamp $(PEERS_DIR)/executorch/.stamp: NEEDS_PYTORCH = yes
SITE_PACKAGES = -c 'import site; print(site.getsitepackages()[0])'

# PyTorch alone, and no longer than this compiles: what is compiled is kept, and the next run goes on from there.
bench-speed: setup ## Compare the time of a training step with PyTorch's: tables, JSON, a picture
	$(BIN)/python -m benchmarks.speed --compile-minutes 1 --seconds 4

bench-all: setup peers ## The same with all peers, on one thread and on two; takes hours the first time
	$(BIN)/python -m benchmarks.speed --ways all --threads 1 2 --output out/speed-all.json

bench-scaling: setup ## Show how the time of a step grows with the batch and with the sequence
	$(BIN)/python -m benchmarks.scaling

bench-kernels: setup ## Show what each kernel reaches of this machine's limits, and PyTorch beside it
	$(BIN)/python -m benchmarks.kernels

bench-ablate: setup ## Show what each pass of the compiler buys, in bytes and milliseconds
	$(BIN)/pockc bench benchmarks/zoo.py:mobilenet_v2 --batch-size 8 --scheme sparse --ablate --json out/ablation.json
	$(BIN)/pockc bench benchmarks/zoo.py:resnet50 --batch-size 1 --scheme sparse --ablate --json out/ablation-resnet50.json

sweep: data ## Find the learning rates that the demo uses
	$(BIN)/python -m benchmarks.sweep

update-golden: setup ## Rewrite the golden files of the tests; review the diff
	$(BIN)/python -m pytest --update-golden $(PYTEST_ARGS)

clean: ## Remove builds, results and tool caches; keep .venv and downloads
	rm -rf build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pockc passes targets tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the environment and the downloads too
	rm -rf $(VENV) .cache
