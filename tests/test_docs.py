"""What docs/ tells is so: worked examples give the numbers shown, and every feature listed has the tests named."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.demo import local_server
from test_readme import alike

ROOT = Path(__file__).parent.parent
NUMBERS, FEATURES, OTHER_APIS = (
    (ROOT / "docs" / name).read_text() for name in ("numbers.md", "features.md", "from-other-apis.md")
)
ROWS = [line.strip("| ").split(" | ") for line in FEATURES.splitlines() if re.match(r"\| \d", line)]
LATER = {22, 23}
"""Rows that may wait: the contract has no field for them."""
LISTED = {*range(1, 31), 32, 33, 36} - LATER


@cache
def contents_of(file: str) -> tuple[set[str], bool]:
    """The tests that a file holds, and whether it serves a model for them."""
    [path] = (ROOT / "tests").rglob(f"{file}.py")
    tree = ast.parse(path.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions}, bool(imported & {"harness", "serving"})


def test_every_row_is_listed_once() -> None:
    assert [int(number) for number, *_ in ROWS] == sorted(LISTED)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"row {row[0]}")
def test_a_row_has_tests_over_a_real_connection(row: list[str]) -> None:
    named = re.findall(r"`(\w+)::(\w+)`", row[2])
    assert named
    for file, test in named:
        tests, serves = contents_of(file)
        assert test in tests, f"{file} has no {test}"
        assert serves, f"{file} reaches no server"


class Alike(doctest.OutputChecker):
    """Takes numbers for the same that differ as those of two machines do."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """Word by word."""
        one, other = (re.findall(r"-?\d+\.\d+|.", text) for text in (want, got))
        return len(one) == len(other) and all(map(near, other, one))


def near(printed: str, shown: str) -> bool:
    """As `alike`; the last digit of what is rounded to two may be another."""
    return alike(printed, shown) or (
        "." in printed[1:] and "." in shown[1:] and abs(float(printed) - float(shown)) < 0.011
    )


@pytest.fixture(scope="module")
def target(embedded_folder: Path) -> Iterator[str]:
    """The address of a server with the default model."""
    with local_server(["--dtype", "float32"]) as address:
        yield address


def test_worked_examples_give_the_numbers_shown(target: str) -> None:
    session = "\n".join(re.findall(r"```pycon\n(.*?)```", NUMBERS, re.DOTALL)).replace("127.0.0.1:50051", target)
    test = doctest.DocTestParser().get_doctest(session, {}, "numbers.md", "docs/numbers.md", 0)
    told: list[str] = []
    results = doctest.DocTestRunner(Alike()).run(test, out=told.append)
    assert results.attempted > 20
    assert not results.failed, "".join(told)


def test_every_number_of_a_token_and_of_totals_is_explained() -> None:
    numbers = {"logprob", "rank", "sampling_logprob", "sampling_set_size", "top", "named", "tail_logprob", "entropy"}
    fields = {field.name for field in pb.Token.DESCRIPTOR.fields}
    assert numbers <= fields
    explained = set(re.findall(r"\*\*`(\w+)`\*\*", NUMBERS))
    assert numbers | {"byte_offset", "code_point_offset", "totals", "greedy", "pmi", "seed", "value"} <= explained


def test_every_criterion_of_a_ranking_is_explained() -> None:
    names = {value.name.removeprefix("RANKING_CRITERION_") for value in pb.RankingCriterion.DESCRIPTOR.values}
    criteria = names - {"UNSPECIFIED"}
    assert criteria <= set(re.findall(r"`([A-Z_]+)`", NUMBERS))


def test_the_fields_that_others_are_mapped_to_exist() -> None:
    known = {name for message in pb.DESCRIPTOR.message_types_by_name.values() for name in message.fields_by_name}
    known |= {value.name for enum in pb.DESCRIPTOR.enum_types_by_name.values() for value in enum.values}
    for line in OTHER_APIS.splitlines():
        first = line.split("|")[1] if line.startswith("| `") else ""
        for path in re.findall(r"`([\w.]+)[`:]", first):
            name = path.rpartition(".")[2]
            assert name in known or f"FINISH_REASON_{name}" in known or path == "FinishReason", path
