# Each target sets up what it needs in .venv by itself; again, that takes no time.
PYTHON ?= python3
# Pinned and installed first, alone: a range would take the newest build there is. README.md says how to choose the build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTO := protos/logprobs/v1/logprobs.proto
ARGS ?=

.PHONY: demo serve test check proto baseline bench clean

demo: $(READY)
	$(BIN)/python -m logprobs_server.demo $(ARGS)

serve: $(READY)
	@exec $(BIN)/python -m logprobs_server $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

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

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cli,server,dev]'
	touch $@
