"""Sentences and tables on a terminal: they fit, and nothing in them becomes another thing by being cut."""

import pytest
from calibcast.calib.number_text import counted
from calibcast.calib.terminal_text import cut, wrapped
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


def test_a_count_of_one_has_a_singular():
    assert [counted(n, "batch") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert counted(1, "entry", "entries") == "1 entry"
