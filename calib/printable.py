"""Makes text from files safe to print: a module's name may hold characters that a terminal or a spreadsheet obeys."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with U+FFFD for every character that could move the cursor, change colours or break a line."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def printable_lines(text: str) -> str:
    """As `printable`, line by line; a tab becomes a space."""
    return "\n".join(printable(line.replace("\t", " ")) for line in text.split("\n"))
