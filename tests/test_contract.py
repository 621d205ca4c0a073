"""The contract's files: documented in full, clean, never broken, and the stubs made from them.

What the contract means is tested elsewhere; nothing here starts a server or reads a generated message.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROTO = "logprobs/v1/logprobs.proto"
BREAKS = 100
"""What buf exits with when it finds something to report."""

SourcePath = tuple[int, ...]
"""Field numbers and indexes that lead to an element, as in google.protobuf.SourceCodeInfo.Location."""


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)


def buf(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(BIN / "buf", *arguments, cwd=cwd)


def elements(file: FileDescriptorProto) -> Iterator[tuple[str, SourcePath]]:
    """Everything that has a name in the file, with its path."""
    for index, message in enumerate(file.message_type):
        yield from message_elements(message, (file.MESSAGE_TYPE_FIELD_NUMBER, index), message.name)
    for index, enum in enumerate(file.enum_type):
        yield from enum_elements(enum, (file.ENUM_TYPE_FIELD_NUMBER, index), enum.name)
    for index, service in enumerate(file.service):
        yield from service_elements(service, (file.SERVICE_FIELD_NUMBER, index))


def message_elements(message: DescriptorProto, path: SourcePath, name: str) -> Iterator[tuple[str, SourcePath]]:
    if message.options.map_entry:
        return
    yield name, path
    for index, member in enumerate(message.field):
        yield f"{name}.{member.name}", (*path, message.FIELD_FIELD_NUMBER, index)
    synthetic = {member.oneof_index for member in message.field if member.proto3_optional}
    for index, oneof in enumerate(message.oneof_decl):
        if index not in synthetic:
            yield f"{name}.{oneof.name}", (*path, message.ONEOF_DECL_FIELD_NUMBER, index)
    for index, nested in enumerate(message.nested_type):
        nested_path = (*path, message.NESTED_TYPE_FIELD_NUMBER, index)
        yield from message_elements(nested, nested_path, f"{name}.{nested.name}")
    for index, enum in enumerate(message.enum_type):
        enum_path = (*path, message.ENUM_TYPE_FIELD_NUMBER, index)
        yield from enum_elements(enum, enum_path, f"{name}.{enum.name}")


def enum_elements(enum: EnumDescriptorProto, path: SourcePath, name: str) -> Iterator[tuple[str, SourcePath]]:
    yield name, path
    for index, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, enum.VALUE_FIELD_NUMBER, index)


def service_elements(service: ServiceDescriptorProto, path: SourcePath) -> Iterator[tuple[str, SourcePath]]:
    yield service.name, path
    for index, method in enumerate(service.method):
        yield f"{service.name}.{method.name}", (*path, service.METHOD_FIELD_NUMBER, index)


def described(file: FileDescriptorProto) -> set[SourcePath]:
    """Paths of the elements that a comment leads."""
    return {tuple(location.path) for location in file.source_code_info.location if location.leading_comments.strip()}


def compiled(folder: Path, target: Path) -> FileDescriptorProto:
    """The one file of the module in `folder`, with its comments."""
    built = buf("build", folder, "--exclude-imports", "-o", target)
    assert built.returncode == 0, built.stderr
    (file,) = FileDescriptorSet.FromString(target.read_bytes()).file
    return file


def test_every_element_of_the_contract_has_a_leading_comment(tmp_path: Path) -> None:
    file = compiled(ROOT / "protos", tmp_path / "contract.binpb")
    documented = described(file)
    named = list(elements(file))
    assert [name for name, path in named if path not in documented] == []
    assert {"LogprobsService.Score", "Token.logprob", "GenerateResponse.event"} <= {name for name, _ in named}


def test_an_element_without_a_comment_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "protos"
    folder.mkdir()
    (folder / "bare.proto").write_text(
        """
        syntax = "proto3";
        message M {
          oneof choice { int32 a = 1; }
          optional int32 b = 2;
          map<int32, int32> c = 3;
          message N {}
          enum F { F_UNSPECIFIED = 0; }
        }
        enum E { E_UNSPECIFIED = 0; }
        service S { rpc Call(M) returns (M); }
        """
    )
    file = compiled(folder, tmp_path / "bare.binpb")
    names = "M M.a M.b M.c M.choice M.N M.F M.F.F_UNSPECIFIED E E.E_UNSPECIFIED S S.Call"
    assert [name for name, _ in elements(file)] == names.split()
    assert described(file) == set()


@pytest.mark.parametrize("command", ["lint", "format --diff --exit-code"])
def test_the_contract_is_clean(command: str) -> None:
    checked = buf(*command.split())
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the contract, to be changed."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def rewrite(folder: Path, pattern: str, replacement: str) -> None:
    proto = folder / "protos" / PROTO
    text, count = re.subn(pattern, replacement, proto.read_text(), flags=re.MULTILINE)
    assert count > 0, f"nothing matches {pattern}"
    proto.write_text(text)


def broken_rules(folder: Path) -> set[str]:
    """Rules that the contract in `folder` breaks, against the last release."""
    baseline = ROOT / "protos" / "baseline.json"
    checked = buf("breaking", "--against", baseline, "--error-format", "json", cwd=folder)
    rules = {json.loads(line)["type"] for line in checked.stdout.splitlines()}
    assert checked.returncode == (BREAKS if rules else 0), checked.stderr
    return rules


def test_the_contract_keeps_what_the_last_release_promised() -> None:
    assert broken_rules(ROOT) == set()


@pytest.mark.parametrize(
    ("pattern", "replacement", "rule"),
    [
        pytest.param(
            "Input context = 1;",
            "Input context = 99;",
            "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED",
            id="field renumbered",
        ),
        pytest.param("string text = 1;", "bytes text = 1;", "FIELD_SAME_TYPE", id="field retyped"),
        pytest.param("int32 top_count = 1;", "uint32 top_count = 1;", "FIELD_SAME_TYPE", id="field unsigned"),
        pytest.param("optional float logprob", "float logprob", "FIELD_SAME_CARDINALITY", id="field not optional"),
        pytest.param("Input prompt = 1;", "repeated Input prompt = 1;", "FIELD_SAME_CARDINALITY", id="repeated"),
        pytest.param(" totals_only = 7;", " totals = 7;", "FIELD_SAME_NAME", id="field renamed"),
        pytest.param("^ *bool next_token = 8;\n", "", "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", id="field removed"),
        pytest.param(
            "^ *bool next_token = 8;\n",
            "  reserved 8;\n",
            "FIELD_NO_DELETE_UNLESS_NAME_RESERVED",
            id="field removed, its name free",
        ),
        pytest.param("oneof search {", "oneof method {", "ONEOF_NO_DELETE", id="oneof renamed"),
        pytest.param(
            "TIME_LIMIT = 6;",
            "TIME_LIMIT = 7;",
            "ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED",
            id="value renumbered",
        ),
        pytest.param("LIMIT = 6;", "OUT = 6;", "ENUM_VALUE_SAME_NAME", id="value renamed"),
        pytest.param(
            "^ *FINISH_REASON_TIME_LIMIT = 6;\n",
            "",
            "ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED",
            id="value removed",
        ),
        pytest.param("LongInput", "Overlong", "ENUM_NO_DELETE", id="enum renamed"),
        pytest.param(r"\bUsage\b", "Cost", "MESSAGE_NO_DELETE", id="message renamed"),
        pytest.param(r"^ *rpc Tokenize\(.*\n", "", "RPC_NO_DELETE", id="method removed"),
        pytest.param("rpc Score[(]", "rpc Rate(", "RPC_NO_DELETE", id="method renamed"),
        pytest.param(
            r"stream GenerateResponse\)",
            "GenerateResponse)",
            "RPC_SAME_SERVER_STREAMING",
            id="method not streaming",
        ),
        pytest.param("service Logprobs", "service Token", "SERVICE_NO_DELETE", id="service renamed"),
    ],
)
def test_a_change_that_breaks_callers_is_found(changed: Path, pattern: str, replacement: str, rule: str) -> None:
    rewrite(changed, pattern, replacement)
    assert rule in broken_rules(changed)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param("Input context = 1;", "Input context = 1; int32 more = 99;", id="field added"),
        pytest.param("TIME_LIMIT = 6;", "TIME_LIMIT = 6; FINISH_REASON_MORE = 7;", id="value added"),
        pytest.param("(rpc Tokeni)ze(.*)", r"\1ze\2 \1se\2", id="method added"),
        pytest.param(
            "^ *bool next_token = 8;\n",
            '  reserved 8; reserved "next_token";\n',
            id="field removed and reserved",
        ),
    ],
)
def test_a_change_that_callers_do_not_notice_is_allowed(changed: Path, pattern: str, replacement: str) -> None:
    rewrite(changed, pattern, replacement)
    assert broken_rules(changed) == set()


def test_the_committed_stubs_are_those_of_the_contract(tmp_path: Path) -> None:
    plugins = [f"--plugin={name}={BIN / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{name}_out={tmp_path}" for name in ("python", "grpc_python", "mypy", "mypy_grpc")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc"]
    generated = run(*protoc, f"-I{ROOT / 'protos'}", *plugins, *outputs, PROTO)
    assert generated.returncode == 0, generated.stderr
    assert stubs(tmp_path) == stubs(ROOT / "client")


def stubs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "logprobs/v1").glob("*_pb2*.py*")}
