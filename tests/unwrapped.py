"""What was printed, as it would be on one line: a terminal's width is not what most tests are about."""


def unwrapped(text: str) -> str:
    """`text` with each run of spaces and line breaks as one space."""
    return " ".join(text.split())
