"""Tables as text: each column's width, what is cut, and what is dropped, at the places where that turns."""

from __future__ import annotations

from typing import Any

import pytest
from calibcast.calib.text_table import Column, and_more, cut, listed, place, text_table

NAME, NUMBER = Column("name", "name"), Column("n", "n", 8, number=True)
ROWS: list[dict[str, Any]] = [{"name": "conv", "n": 1.5}, {"name": "linear", "n": 123.4}, {"name": "x", "n": None}]


def test_text_is_left_and_numbers_are_right() -> None:
    assert text_table(ROWS, [NAME, NUMBER], 80) == [
        "name       n",
        "conv     1.5",
        "linear 123.4",
        "x",
    ]
    assert text_table(ROWS[:1], [NAME, NUMBER], 80, indent="  ") == ["  name   n", "  conv 1.5"]
    assert text_table([], [NAME, NUMBER], 80) == ["name n"]


def test_an_empty_column_is_left_out() -> None:
    rows = [{"name": "a", "n": None}, {"name": "b"}]
    assert text_table(rows, [NAME, NUMBER], 80) == ["name", "a", "b"]


def test_a_width_is_a_most() -> None:
    rows = [{"name": "abcdefgh", "n": 1}]
    assert text_table(rows, [Column("name", "name", 6), NUMBER], 80) == ["name   n", "..efgh 1"]
    assert text_table(rows, [Column("name", "name", 6, head=True), NUMBER], 80) == ["name   n", "abcd.. 1"]
    assert text_table(rows, [Column("name", "name", 8), NUMBER], 80) == ["name     n", "abcdefgh 1"]


@pytest.mark.parametrize(
    ("width", "second", "third"),
    [(50, True, True), (38, True, True), (37, True, False), (33, True, False), (32, False, False)],
)
def test_the_column_of_the_largest_number_is_dropped_first(width: int, second: bool, third: bool) -> None:
    """The text needs 24 columns, or all that it has; the others take what they need and a space."""
    columns = [Column("t", "t"), Column("b", "b", 8, drop=1), Column("c", "c", 4, drop=2)]
    row = {"t": "x" * 30, "b": "y" * 8, "c": "z" * 4}
    heading = text_table([row], columns, width)[0].split()
    assert heading == ["t", *["b"] * second, *["c"] * third]


def test_of_two_that_may_go_the_last_goes_first() -> None:
    columns = [Column("t", "t"), Column("b", "b", 8, drop=1), Column("c", "c", 8, drop=1)]
    row = {"t": "x" * 30, "b": "y" * 8, "c": "z" * 8}
    assert text_table([row], columns, 34)[0].split() == ["t", "b"]


def test_texts_share_what_is_left_and_short_ones_need_less() -> None:
    columns = [Column("a", "a"), Column("b", "b"), Column("c", "c")]
    row = {"a": "x" * 40, "b": "short", "c": "y" * 40}
    first, second = text_table([row], columns, 57)[1].split(" short ")
    assert (len(first), len(second)) == (25, 25)
    # No text gets less than twelve columns, even if the line is then too long.
    first, second = text_table([row], columns, 20)[1].split(" short ")
    assert (len(first), len(second)) == (12, 12)


def test_one_text_takes_the_whole_width() -> None:
    assert [len(line) for line in text_table([{"name": "x" * 50}], [NAME], 40)] == [4, 40]
    assert [len(line) for line in text_table([{"name": "x" * 50}], [NAME], 40, indent="  ")] == [6, 40]
    assert [len(line) for line in text_table([{"name": "x" * 50, "n": 1.0}], [NAME, NUMBER], 40)] == [40, 40]


def test_wide_and_combining_characters_count_as_they_are_shown() -> None:
    wide, combined = "日本", "e\u0301"
    rows = [{"name": wide, "n": 1}, {"name": combined, "n": 2}]
    assert text_table(rows, [NAME, NUMBER], 80) == ["name n", f"{wide} 1", f"{combined}    2"]
    assert cut(wide, 4) == wide
    assert cut(wide * 2, 7) == f"..{wide}"
    assert cut(combined, 1) == combined


@pytest.mark.parametrize(
    ("width", "tail", "head"),
    [(6, "abcdef", "abcdef"), (5, "..def", "abc.."), (3, "..f", "a.."), (2, "..", ".."), (1, "..", "..")],
)
def test_what_is_cut_shows_its_end_or_its_beginning(width: int, tail: str, head: str) -> None:
    assert cut("abcdef", width) == tail
    assert cut("abcdef", width, head=True) == head


def test_lists_end_in_how_many_more() -> None:
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a\x1b[31m"], 2) != "a\x1b[31m"
    assert listed([], 2) == ""
    assert and_more(3, 5) == ["and 2 more"]
    assert and_more(3, 5, ": --rows 5") == ["and 2 more: --rows 5"]
    assert and_more(5, 5) == and_more(6, 5) == []


def test_tensors_are_named_by_their_place() -> None:
    assert [place("split", number) for number in (0, 1, 2)] == ["split", "split[1]", "split[2]"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    (_, line) = text_table([{"name": "a\x1b[31mb\nc"}], [NAME], 80)
    assert line.isprintable()
