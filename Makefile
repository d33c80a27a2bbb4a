# Everything a person does with a checkout. Each target makes what it needs: nothing has to be set up before.
# The environment is made anew when pyproject.toml, setup.py or the C sources change; PYTHON chooses the interpreter.

PYTHON  ?= python3
RUN     := .venv/bin/python
PYTEST  := $(RUN) -m pytest
BUILD   := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)
PIP     := -m pip --disable-pip-version-check --quiet
extra    = -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'], sep='\n')"
TORCH   ?= 2.13.0

.PHONY: help train finetune-lora finetune-qlora demo-base test tier1 tier2 tier3 test-peers lint sanitize bench \
        bench-check memory clean
.DEFAULT_GOAL := help

help: ## what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

train: .venv/.ready ## train a LLaMA on real text, within three minutes; ARGS="--section.key value" to change it
	@$(RUN) -m entrenar train $(ARGS)

finetune-lora: .venv/.ready ## a small model learns to read dates with LoRA, measured before and after; ARGS="--adapter.r 4"
	@$(RUN) -m entrenar.examples.finetune_lora $(ARGS)

finetune-qlora: .venv/.ready ## the same with QLoRA: the base held in 4 bits
	@$(RUN) -m entrenar.examples.finetune_qlora $(ARGS)

demo-base: .venv/.ready ## trains that small model again (it is shipped), into runs/demo-base; minutes
	@$(RUN) -m entrenar.examples.train_base runs/demo-base $(ARGS)

test: tier3 ## every test that needs no other project's code

tier1: .venv/.ready-test ## seconds: the gradient checks that guard an edit
	@$(PYTEST) -m tier1

tier2: .venv/.ready-test ## under two minutes: what every commit needs
	@$(PYTEST) -m "not tier3 and not peers"

tier3: .venv/.ready-test ## minutes: everything
	@$(PYTEST) -m "not peers" --hypothesis-profile=tier3

test-peers: .venv-peers/.ready ## every operation and a whole model against PyTorch and transformers (fetches them)
	@.venv-peers/bin/python -m pytest -m peers

lint: .venv/.ready-lint ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

# A build and an environment of its own, so that the everyday one stays as it is. Tests run from build/sanitize, by
# the pytest program: nothing puts the checkout's own entrenar/ before the installed one.
SANITIZED := ASAN_OPTIONS=detect_leaks=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
             LD_PRELOAD=$$($${CC:-gcc} -print-file-name=libasan.so) PYTHONMALLOC=malloc ENTRENAR_KERNELS=native
SUITE     := tests/test_kernels.py tests/test_kernel_properties.py tests/test_threads.py tests/test_quantize_kernels.py

sanitize: .venv-sanitize/.ready ## the kernel suite under AddressSanitizer and UndefinedBehaviorSanitizer
	@cd build/sanitize && $(SANITIZED) ../../.venv-sanitize/bin/pytest -c ../../pyproject.toml --rootdir ../.. \
	    -p no:cacheprovider -m "not tier3 and not peers" $(addprefix ../../,$(SUITE))

bench: .venv/.ready .venv-peers/.ready .venv-peers/.ready-bench ## the measured tables, against NumPy, PyTorch, llama.cpp and others; ARGS="--full"
	@$(RUN) -m benchmarks $(ARGS)

bench-check: .venv/.ready ## whether anything got slower than the committed results, against NumPy, and PyTorch where it is
	@$(RUN) -m benchmarks.check $(ARGS)

memory: .venv/.ready ## memory of full fine-tuning, LoRA and QLoRA: arithmetic and measured, up to 7B; ARGS="--quick"
	@$(RUN) -m entrenar.examples.memory_benchmarks $(ARGS)

clean: ## removes builds, environments and caches; runs/ stays
	rm -rf build dist *.egg-info entrenar/_kernels*.so .venv .venv-peers .venv-sanitize
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. A stamp file stands for each state; the package is installed in place (-e), its kernels built beside it.

define new_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "entrenar needs Python 3.11 or newer, $(PYTHON) is not; try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "setting up $(@D), once ..."
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
endef

.venv/.ready: $(BUILD)
	$(new_venv)
	@$(RUN) $(PIP) install -e .
	@touch $@

.venv/.ready-test: .venv/.ready
	@$(RUN) $(call extra,test) | $(RUN) $(PIP) install -r /dev/stdin
	@touch $@

.venv/.ready-lint: .venv/.ready-test
	@$(RUN) $(call extra,lint) | $(RUN) $(PIP) install -r /dev/stdin
	@touch $@

# PyTorch's build without CUDA: from a local index that has it, else from its own; else (macOS) the only one there is.
.venv-peers/.ready: $(BUILD)
	$(new_venv)
	@.venv-peers/bin/python $(PIP) install 'torch==$(TORCH)+cpu' 2>/dev/null \
	    || .venv-peers/bin/python $(PIP) install 'torch==$(TORCH)+cpu' --index-url https://download.pytorch.org/whl/cpu \
	    || .venv-peers/bin/python $(PIP) install 'torch==$(TORCH)'
	@.venv-peers/bin/python $(PIP) install transformers peft bitsandbytes accelerate jinja2 protobuf gguf \
	    sentencepiece -e '.[test]'
	@touch $@

# llama.cpp is compiled on the spot, which takes many minutes, twice: its instruction set is fixed by that. Only the
# benchmarks need it; where it cannot be built the tables say so, and the next run tries again. pip's cache would take
# one build for the other.
LLAMA_CPP ?= 0.3.36
AVX2      := -DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
llama_cpp  = rm -rf .venv-peers/llama.cpp/$(1) && CMAKE_ARGS='$(2) -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF' \
    .venv-peers/bin/python $(PIP) install --no-cache-dir --no-deps --no-binary llama-cpp-python \
    --target .venv-peers/llama.cpp/$(1) 'llama-cpp-python==$(LLAMA_CPP)' diskcache

.venv-peers/.ready-bench: | .venv-peers/.ready
	@echo "building llama.cpp, once, in some ten minutes ..."
	@{ $(call llama_cpp,avx2,$(AVX2)) && $(call llama_cpp,native,-DGGML_NATIVE=ON) && touch $@; } \
	    || echo "llama.cpp could not be built (it needs cmake and a C++ compiler): the tables will say so" >&2

# Built from a copy: the objects of the everyday build are not these.
.venv-sanitize/.ready: $(BUILD) $(wildcard entrenar/*.py entrenar/*/*.py)
	$(new_venv)
	@rm -rf build/sanitize
	@mkdir -p build/sanitize/source
	@cp -r $(wildcard pyproject.toml setup.py MANIFEST.in README.md LICENSE csrc entrenar) build/sanitize/source/
	@rm -f build/sanitize/source/entrenar/_kernels*
	@ENTRENAR_SANITIZE=address,undefined .venv-sanitize/bin/python $(PIP) install --force-reinstall --no-cache-dir \
	    'build/sanitize/source[test]'
	@touch $@
