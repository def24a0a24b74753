"""The errors: one base, evidence attached, near names listed."""

from __future__ import annotations

import json

import pytest
import torch
from calibcast import calib
from calibcast.calib import BatchError, CalibcastError, GateError
from calibcast.calib import errors as module
from calibcast.calib.errors import first_line, known, raised_at


def test_every_error_has_one_base() -> None:
    """Whoever catches CalibcastError catches all, and the tree in the docstring names each."""
    classes = [entry for entry in vars(module).values() if isinstance(entry, type) and issubclass(entry, Exception)]
    assert len(classes) > 7
    for entry in classes:
        assert issubclass(entry, CalibcastError)
        assert entry.__name__ in str(module.__doc__)
        assert getattr(calib, entry.__name__) is entry


def test_an_error_is_placed_by_the_innermost_line_of_the_users_own() -> None:
    def inner() -> None:
        torch.ones(2).reshape(3)

    def outer() -> None:
        inner()

    line = inner.__code__.co_firstlineno + 1
    for call in (inner, outer):
        with pytest.raises(RuntimeError) as shape:
            call()
        assert raised_at(shape.value) == f" ({__file__}:{line})"
    with pytest.raises(ZeroDivisionError) as division:
        exec("1 / 0", {})
    assert raised_at(division.value).startswith(f" ({__file__}:")
    with pytest.raises(json.JSONDecodeError) as parsed:
        json.loads("{")
    assert raised_at(parsed.value).startswith(f" ({__file__}:")
    own = parsed.value.__traceback__
    assert own is not None
    assert "decoder.py:" in raised_at(parsed.value.with_traceback(own.tb_next))
    assert raised_at(ValueError("without a traceback")) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n\n one\ntwo"), "one"),
        (ValueError(" "), "ValueError(' ')"),
        (ValueError(), "ValueError()"),
    ],
)
def test_a_message_is_told_by_its_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_evidence_travels_with_the_error() -> None:
    """Errors that hold evidence hold None without it, and print their message alone."""
    assert BatchError("batch 3").ranges is None
    assert GateError("too low", report="the report").report == "the report"
    assert str(GateError("too low", report="the report")) == "too low"


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("linaer", ["conv", "linear", "linear_1"], "near names: linear, linear_1"),
        ("zzz", ["b", "a"], "known: a, b"),
        (
            "zzz",
            [f"node{i}" for i in range(11)],
            "known: node0, node1, node10, node2, node3, node4, node5, node6 and 3 more",
        ),
        ("zzz", [], "known: "),
    ],
)
def test_unknown_names_list_the_near_or_the_known(name: str, names: list[str], expected: str) -> None:
    """Near names come first; where none is near, some of those that exist, and how many more there are."""
    assert known(name, names) == expected
