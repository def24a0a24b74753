"""Text from files, safe to print: names of modules may hold what a terminal or a spreadsheet obeys."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without what would move a terminal's cursor, change its colours or break a line."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def printable_lines(text: str) -> str:
    """As `printable`, line by line; a tab becomes a space."""
    return "\n".join(printable(line.replace("\t", " ")) for line in text.split("\n"))
