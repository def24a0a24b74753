"""The footer of a Parquet file, as far as it is needed: each kind of value of Thrift's compact protocol, and limits.

Bytes are written by hand as thrift-compact-protocol.md of apache/thrift has them.
"""

from __future__ import annotations

import struct
from io import BytesIO

import polars as pl
import pytest
from calibcast.calib.parquet_size import _Compact, declared, declared_too_much

END = bytes([0])


def field(step: int, kind: int, value: bytes = b"") -> bytes:
    """A field whose number is `step` above that of the one before."""
    return bytes([step << 4 | kind]) + value


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def zigzag(number: int) -> bytes:
    return varint(2 * number if number >= 0 else -2 * number - 1)


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (1, b"", True),
        (2, b"", False),
        (3, b"\x07", 7),
        (4, zigzag(-3), -3),
        (5, zigzag(0), 0),
        (5, zigzag(300), 300),
        (6, zigzag(2**62), 2**62),
        (6, zigzag(-(2**40) - 1), -(2**40) - 1),
        (7, struct.pack("<d", 1.5), struct.pack("<d", 1.5)),
        (8, varint(3) + b"abc", b"abc"),
        (8, varint(0), b""),
        (8, varint(200) + b"x" * 200, b"x" * 200),
        (9, bytes([2 << 4 | 5]) + zigzag(1) + zigzag(-1), [1, -1]),
        (9, bytes([0]), []),
        (9, bytes([14 << 4 | 3]) + bytes(range(14)), list(range(14))),
        (9, bytes([15 << 4 | 3]) + varint(20) + bytes(range(20)), list(range(20))),  # 15: the size follows
        (9, bytes([3 << 4 | 2]) + b"\x01\x02\x01", [1, 2, 1]),  # in a list, a truth value takes a byte
        (10, bytes([1 << 4 | 5]) + zigzag(9), [9]),
        (11, varint(0), []),
        (11, varint(2) + bytes([3 << 4 | 8]) + b"\x01" + varint(1) + b"a" + b"\x02" + varint(0), [(1, b"a"), (2, b"")]),
        (12, field(1, 5, zigzag(4)) + END, {1: 4}),
    ],
)
def test_each_kind_of_value_is_read_and_what_follows_too(kind: int, value: bytes, read: object) -> None:
    found = _Compact(field(3, kind, value) + field(2, 5, zigzag(77)) + END).struct()
    assert found == {3: read, 5: 77}


def test_the_number_of_a_field_may_follow_its_kind() -> None:
    content = field(0, 5, zigzag(100) + zigzag(1)) + field(15, 5, zigzag(2)) + field(0, 3, zigzag(3) + b"\x08") + END
    assert _Compact(content).struct() == {100: 1, 115: 2, 3: 8}


def footer(*chunks: tuple[int, int], groups: int = 1) -> bytes:
    """A file that declares these numbers of values and of bytes, in each of some row groups."""
    columns = b"".join(
        field(3, 12, field(5, 6, zigzag(values)) + field(1, 6, zigzag(size)) + END) + END for values, size in chunks
    )
    group = field(1, 9, bytes([len(chunks) << 4 | 12]) + columns) + END
    content = field(4, 9, bytes([groups << 4 | 12]) + group * groups) + END
    return b"PAR1" + content + struct.pack("<I", len(content)) + b"PAR1"


def test_every_column_of_every_group_is_declared() -> None:
    assert declared(footer((5, 40), (6, 1000))) == [(5, 40), (6, 1000)]
    assert declared(footer((5, 40), (6, 1000), groups=3)) == [(5, 40), (6, 1000)] * 3
    assert declared(b"PAR1" + END + struct.pack("<I", 1) + b"PAR1") == []


def test_a_footer_is_as_long_as_it_says() -> None:
    content = footer((5, 40))
    assert declared(b"anything before it" + content) == [(5, 40)]
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"its footer is damaged \((IndexError|KeyError)\)"):
            declared(content[:length])


@pytest.mark.parametrize("kind", [8, 9])
def test_a_length_beyond_the_file_is_damage(kind: int) -> None:
    value = varint(2**40) if kind == 8 else bytes([15 << 4 | 3]) + varint(2**40)
    content = field(1, kind, value) + END
    with pytest.raises(ValueError, match="its footer is damaged"):
        declared(content + struct.pack("<I", len(content)) + b"PAR1")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (field(4, 5, zigzag(3)), "TypeError"),  # row groups that are a number
        (field(4, 9, bytes([1 << 4 | 12]) + END), "KeyError"),  # a row group without columns
        (field(4, 9, bytes([1 << 4 | 5]) + zigzag(1)), "TypeError"),
        (field(1, 12) * 5000, "RecursionError"),
    ],
)
def test_what_is_no_footer_is_damage(content: bytes, error: str) -> None:
    content += END
    with pytest.raises(ValueError, match=rf"its footer is damaged \({error}\)"):
        declared(content + struct.pack("<I", len(content)) + b"PAR1")


def test_a_varint_ends_where_a_number_does() -> None:
    """A number has 64 bits; bytes that go on and on do not make a larger one."""
    assert _Compact(b"\xff" * 9 + b"\x01" + b"\xff" * 50)._varint() == 2**64 - 1
    assert _Compact(b"\xff" * 60)._varint() < 2**72


# Beside the 64 MB that any file may declare, fifty bytes for each byte of its own.
FREE = 64 << 20


@pytest.mark.parametrize(
    ("values", "size", "above"),
    [(0, 0, 0), (0, 0, 1), (0, 17, 0), (1, 17, 0), (1, 17, 1), (3, 17, 0), (3, 17, 1), (0, 17, 1)],
)
def test_a_value_counts_as_eight_bytes_or_as_many_as_are_declared(values: int, size: int, above: int) -> None:
    own = max(8 * values, size)
    # The size of the file depends on how long its numbers are: two limits that take the same bytes.
    near = footer((values, size), (0, FREE + 50 * 40))
    limit = FREE + 50 * len(near) - own
    content = footer((values, size), (0, limit + above))
    assert len(content) == len(near)
    said = f"it declares {limit + own + above} bytes of values, and has {len(content)}"
    assert declared_too_much(content) == (said if above else None)


def test_what_polars_writes_is_read() -> None:
    frame = pl.DataFrame({"a": [1.5] * 1000, "b": list(range(1000)), "c": [["x", "y"]] * 1000})
    file = BytesIO()
    frame.write_parquet(file, row_group_size=250)
    found = declared(file.getvalue())
    assert [values for values, _ in found] == [250, 250, 500] * 4
    assert declared_too_much(file.getvalue()) is None
