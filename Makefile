# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv when there is none.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-browser test-ray test-arm64 test-cpp cpp web-runtime wheel tensorrt-bindings check clean

help:
	@echo "make demo       train, export, classify and measure on handwritten digits (about a minute)"
	@echo "make test       run the tests (a few minutes)"
	@echo "make wheel      build the wheel that a device installs, into dist/"
	@echo "make test-slow  run the tests marked slow"
	@echo "make web-runtime  fetch ONNX Runtime Web, which python -m deploy.web copies (needs npm)"
	@echo "make test-ray   run the tests on a local Ray cluster"
	@echo "make cpp        build the C++ programs of deploy/cpp into build/cpp (CMake, libstb-dev, nlohmann-json3-dev)"
	@echo "make test-cpp   build them and compare them with runtime.Classifier"
	@echo "make test-arm64 run the shipped networks on an emulated ARM64 (Debian, qemu-user-static)"
	@echo "make test-browser run the tests in a browser (needs npm and Chromium)"
	@echo "make tensorrt-bindings  fetch TensorRT's bindings 10.3, 10.16 and 11.4 and CUDA's runtime 12.6 (5 MB) for tests"
	@echo "make check      ruff and mypy"
	@echo "make clean      remove .venv, demo and caches"

demo: $(VENV)/.installed
	$(BIN)/python -m bench.demo

# Two processes with one thread each: the networks of the tests are too small to share one between cores.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# Only files are taken from the packages: none of their scripts runs.
web-runtime:
	npm ci --prefix deploy/web --ignore-scripts --no-audit --no-fund

test-browser: $(VENV)/.installed web-runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/browser

test-arm64: $(VENV)/.installed
	tests/make_arm64.sh build/arm64 $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m arm64 tests/test_arm64.py

test-ray: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[data]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/test_deploy_batch.py

# Without ONNX Runtime's headers there is no classify-ort.
cpp: $(VENV)/.installed
	-deploy/cpp/ort_headers.sh build/ort-headers
	cmake -S deploy/cpp -B build/cpp -DCMAKE_INCLUDE_PATH=$(CURDIR)/build/ort-headers/usr/include \
		-DOpenVINO_DIR="$$($(BIN)/python -c 'import openvino.utils as u; print(u.get_cmake_path())')" \
		-DORT_LIBRARY="$$(ls $$($(BIN)/python -c 'import onnxruntime as o; print(o.__path__[0])')/capi/libonnxruntime.so.1.*)"
	cmake --build build/cpp --target all show-pixels

test-cpp: cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cpp tests/test_deploy_cpp.py

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

# Wheels without TensorRT's libraries, enough to see which names each release has; and the CUDA runtime of JetPack 6.
tensorrt-bindings: $(VENV)/.installed
	for wheel in cu12-bindings==10.3.0 cu13-bindings==10.16.1.11 cu13-bindings==11.4.0.106; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target build/tensorrt-bindings/$${wheel##*==} tensorrt-$$wheel || exit 1; \
	done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/cuda-runtime/12.6.77 nvidia-cuda-runtime-cu12==12.6.77

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Making the virtual environment $(VENV): torch with its CUDA libraries takes 5 GB and a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
