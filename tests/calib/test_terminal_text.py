"""Sentences and tables on a terminal: they fit, and nothing in them becomes another thing by being cut."""

import pytest
from calibcast.calib.number_text import counted
from calibcast.calib.terminal_text import broken, columns_of, cut, terminal_width, wrapped
from calibcast.calib.text_table import Column, text_table

SENTENCE = "PrecisionPlan: 14 float16, 8 high, 2 kept; 63.6% of nodes and 100.0% of work in low precision"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_long_sentence_is_broken_at_spaces_and_loses_nothing(width):
    lines = wrapped(SENTENCE, width).split("\n")
    assert max(map(len, lines)) <= width
    assert " ".join(line.strip() for line in lines) == SENTENCE
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_line_with_a_label_goes_on_under_its_text():
    first, second = wrapped(f"plan        plan.json: made; {SENTENCE[:60]}", 80).split("\n")
    assert first == "plan        plan.json: made; PrecisionPlan: 14 float16, 8 high, 2 kept; 63.6% of"
    assert second == " " * 12 + "nodes an"
    assert wrapped("held out    ten rows of it and more", 26) == "held out    ten rows of it\n            and more"


def test_words_that_no_line_can_hold_stay_whole_and_where_they_are():
    path = "/artifacts" * 12
    assert wrapped(f"wrote {path}", 80) == f"wrote {path}"
    assert wrapped(f"wrote {path} and {SENTENCE[:75]}", 80).split("\n")[0] == f"wrote {path}"


def test_a_number_keeps_its_unit():
    assert wrapped("budget 40 dB, predicted 57.2 dB", 30) == "budget 40 dB, predicted\n  57.2 dB"


def test_what_fits_is_left_as_it_is():
    text = "  a  table   row\n\nsentence   "
    assert wrapped(text, 80) == text


def test_a_number_is_never_cut():
    rows = [{"name": "output", "growth": 123456789.0, "share": "100000 of 250000"}]
    columns = [
        Column("name", "tensor"),
        Column("growth", "growth", 8, number=True),
        Column("share", "s", 8, number=True),
    ]
    assert text_table(rows, columns, 80)[1].split() == ["output", "1.235e+08", "100000", "of", "250000"]


def test_a_sentence_is_cut_between_words():
    assert cut("its output reached 5 in batch 0, above headroom 16376", 50, head=True).endswith("above headroom ..")


def test_a_last_column_that_wraps_shows_its_text_on_three_lines_at_most():
    columns = [Column("node", "node"), Column("reason", "reason", wrap=True)]
    rows = [{"node": "add", "reason": "because " * 40}, {"node": "mul", "reason": "short"}]
    heading, *lines = text_table(rows, columns, 60)
    assert heading == "node reason"
    assert [line[:4].strip() for line in lines] == ["add", "", "", "mul"]
    assert lines[2].endswith(" ..")
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("count", "lines"),
    [
        (5, ["add  because because", "     because because", "     because"]),
        (6, ["add  because because", "     because because", "     because because"]),
        (7, ["add  because because", "     because because", "     because .."]),
    ],
)
def test_a_fourth_line_is_cut(count, lines):
    columns = [Column("node", "node"), Column("reason", "reason", wrap=True)]
    rows = [{"node": "add", "reason": " ".join(["because"] * count)}]
    assert text_table(rows, columns, 20)[1:] == lines


@pytest.mark.parametrize(
    ("line", "space", "pieces"),
    [
        ("one two three", 13, ["one two three"]),
        ("one two three", 12, ["one two", "  three"]),
        ("one two three", 7, ["one two", "  three"]),
        ("one two three", 6, ["one", "  two three"]),  # the last word would be too long there, too
        ("one two end", 6, ["one", "  two", "  end"]),
        ("  one two three", 9, ["  one two", "    three"]),
        ("one     two three", 16, ["one     two", "  three"]),  # a label of half a line or more is none
        ("  one   two three", 16, ["  one   two", "    three"]),
        ("a label  two three", 18, ["a label  two three"]),
        ("a label  two three", 17, ["a label  two", "  three"]),
        ("one   two three", 14, ["one   two", "      three"]),  # under its text
        ("one   two three", 12, ["one   two", "  three"]),
        ("extraordinary two", 5, ["extraordinary", "  two"]),
        ("two extraordinary", 5, ["two extraordinary"]),  # it would be too long on the next line, too
        ("two extraordinary to end", 5, ["two extraordinary", "  to", "  end"]),
        ("two extra end", 7, ["two", "  extra", "  end"]),
        ("two extra end", 6, ["two extra", "  end"]),
        ("日本 日本 日本", 9, ["日本 日本", "  日本"]),
        ("日本 日本 日本", 8, ["日本", "  日本", "  日本"]),
        ("holds 40 dB", 9, ["holds", "  40 dB"]),
        ("holds 40 kB", 9, ["holds", "  40 kB"]),
        ("holds 40 B", 9, ["holds", "  40 B"]),
        ("holds 40 dBm", 9, ["holds 40", "  dBm"]),
        ("", 5, [""]),
    ],
)
def test_where_a_line_is_broken(line, space, pieces):
    assert broken(line, space) == pieces


def test_how_far_the_rest_is_indented_can_be_said():
    assert broken("one two three", 7, hang=0) == ["one two", "three"]
    assert broken("one   two three", 14, hang=4) == ["one   two", "    three"]


@pytest.mark.parametrize(
    ("text", "width", "head"),
    [
        ("above 163.76 and", 13, "above .."),  # half a number would be another number
        ("above and 163.76", 13, "above and .."),
        ("a bcdefghijkl", 12, "a bcdefghi.."),  # a gap in the first half is left
        ("abcdef ghijkl", 12, "abcdef .."),
        ("abcde fghijklm", 12, "abcde .."),
        ("abcd efghijklm", 12, "abcd efghi.."),
    ],
)
def test_a_beginning_ends_behind_a_word_of_its_second_half(text, width, head):
    assert cut(text, width, head=True) == head


@pytest.mark.parametrize(
    ("text", "columns"), [("", 0), ("abc", 3), ("日", 2), ("ｱ", 1), ("\uff21", 2), ("e\u0301", 1), ("·", 1)]
)
def test_how_many_columns_a_text_takes(text, columns):
    assert columns_of(text) == columns


def test_a_width_that_nobody_says_is_eighty(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr("os.get_terminal_size", lambda fd: (_ for _ in ()).throw(OSError))
    assert terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33
    assert wrapped("x" * 30 + " yyyy") == "x" * 30 + "\n  yyyy"


def test_a_count_of_one_has_a_singular():
    assert [counted(n, "batch") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(2, "entry", "entries") == "2 entries"
    assert [counted(2, noun) for noun in ("class", "box", "dish", "match", "node")] == [
        "2 classes", "2 boxes", "2 dishes", "2 matches", "2 nodes",
    ]  # fmt: skip
