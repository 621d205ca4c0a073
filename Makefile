# Each target sets up what it needs in .venv by itself; again, that takes no time.
PYTHON ?= python3
# Pinned and installed first, alone: a range would take the newest build there is. README.md says how to choose the build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
PROTO := protos/logprobs/v1/logprobs.proto
ARGS ?=

.PHONY: demo serve test fuzz slow-reader check proto baseline bench bench-fidelity bench-peers clean

demo: $(READY)
	$(BIN)/python -m logprobs_server.demo $(ARGS)

serve: $(READY)
	@exec $(BIN)/python -m logprobs_server $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# Random and broken requests against a live server: make fuzz ARGS="--requests 100000"
fuzz: $(READY)
	PYTHONPATH=tests/service $(BIN)/python tests/fuzz.py $(ARGS)

# Memory of client and server while 5,000 scored sequences wait for a slow reader.
slow-reader: $(READY)
	$(BIN)/python tests/slow_reader.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/baseline.json

proto: $(READY)
	$(BIN)/buf format --write
	$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=client --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client $(PROTO)

# On release only: what `check` compares the contract with from then on.
baseline: $(READY)
	$(BIN)/buf build --exclude-source-info -o protos/baseline.json

# Beside transformers, which is there; PICTURE is an .svg or .png file.
PICTURE ?= build/bench.svg
bench: $(BENCH_READY)
	$(BIN)/python -m bench --picture $(PICTURE) $(ARGS)

# Beside the other rivals too. The first time it installs them into .venv-peers: 7 GB, about a quarter of an hour.
bench-peers: $(BENCH_READY)
	$(BIN)/python -m bench --picture $(PICTURE) --rivals all $(ARGS)

# How near to float64, beside transformers and the rivals that `bench-peers` has installed.
bench-fidelity: $(READY)
	$(BIN)/python -m bench.fidelity $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli,server,dev]'
	touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@
