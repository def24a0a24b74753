"""A checksum inside a Parquet file, checked before a Parquet reader parses any of its bytes.

Damaged bytes can make a reader crash the process, and damage inside a column can go unnoticed. So the file's own
metadata hold a hash of all its bytes, where the hash itself counts as zeros. Any other reader sees a plain Parquet file
with one more metadata entry, and the check needs no Parquet reader.
"""

from __future__ import annotations

import re

import xxhash

_MARK, _DIGITS = "xxh3-128:", 32
_SEAL = re.compile(rf"{_MARK}([0-9a-f]{{{_DIGITS}}})".encode())
# Metadata for `write_parquet`; `sealed` then fills in the checksum.
UNSEALED = {"calibcast.checksum": f"{_MARK}{'0' * _DIGITS}"}


def sealed(content: bytes) -> bytes:
    """The bytes of a Parquet file that was written with `UNSEALED` in its metadata, with their checksum filled in.

    Raises ValueError when there is no place for it.
    """
    place = _place(content)
    if place is None:
        raise ValueError("the file has no place for a checksum: write it with the metadata UNSEALED")
    start, end = place.span(1)
    return content[:start] + _digest(content, place) + content[end:]


def broken_seal(content: bytes) -> str | None:
    """What is wrong with a file's checksum: there is none, or it does not match; None when it is right."""
    place = _place(content)
    if place is None:
        return "it has no checksum of calibcast's"
    return None if place[1] == _digest(content, place) else "its checksum is not that of its bytes"


def _place(content: bytes) -> re.Match[bytes] | None:
    """The last text that looks like a checksum: metadata are at the end of the file, and a name in a column may look
    like one, too.
    """
    start = content.rfind(_MARK.encode())
    return None if start < 0 else _SEAL.match(content, start)


def _digest(content: bytes, place: re.Match[bytes]) -> bytes:
    start, end = place.span(1)
    total = xxhash.xxh3_128()
    view = memoryview(content)
    for part in (view[:start], b"0" * _DIGITS, view[end:]):
        total.update(part)
    return total.hexdigest().encode()
