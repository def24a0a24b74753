"""How much memory a Parquet file would take, from its footer: a few kilobytes can declare gigabytes.

Columns are compressed, and equal values in a row cost nothing. So what a file declares is looked at before polars makes
room for it. The footer is in Thrift's compact protocol, of which this reads as much as it needs; polars tells no such
numbers, and importing pyarrow takes longer than a whole report.

Fields: parquet.thrift of apache/parquet-format; encoding: thrift-compact-protocol.md of apache/thrift.
"""

from __future__ import annotations

import struct
from typing import Any

# A file may declare so many bytes, whatever its size: a table of some 30,000 tensors.
_FREE = 64 << 20
# A row of a range table has 2 KB, most of it zeros in a histogram, and takes at least 100 bytes in the file.
_RATIO = 50
_WIDTH = 8  # bytes of a number
# FileMetaData.row_groups; RowGroup.columns; ColumnChunk.meta_data; ColumnMetaData.num_values, .total_uncompressed_size.
_ROW_GROUPS, _COLUMNS, _META, _VALUES, _BYTES = 4, 1, 3, 5, 6
_LONGEST = 63  # bits of a number
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


def declared_too_much(content: bytes) -> str | None:
    """How many bytes a Parquet file declares, for a message, where no table of calibcast has so many; else None.

    Raises ValueError for a footer that cannot be read.
    """
    held = sum(max(values * _WIDTH, size) for values, size in declared(content))
    if held <= _FREE + _RATIO * len(content):
        return None
    return f"it declares {held} bytes of values, and has {len(content)}"


def declared(content: bytes) -> list[tuple[int, int]]:
    """The number of values and of bytes, unpacked, of every column in every row group. Raises ValueError."""
    length = int.from_bytes(content[-8:-4], "little")
    try:
        footer = _Compact(content[len(content) - 8 - length : -8]).struct()
        chunks = [chunk[_META] for group in footer.get(_ROW_GROUPS, []) for chunk in group[_COLUMNS]]
        return [(int(chunk[_VALUES]), int(chunk[_BYTES])) for chunk in chunks]
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ValueError(f"its footer is damaged ({type(error).__name__})") from error


class _Compact:
    """Reads values of Thrift's compact protocol. Each item of a list takes a byte at least, so a list has an end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self) -> dict[int, Any]:
        """The fields of a struct, by their number."""
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # in a list, a truth value takes a byte
            return self._byte()
        if kind in (_DOUBLE, _BINARY):
            return self._take(8 if kind == _DOUBLE else self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            size = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(size)]
        if kind == _MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
        return self.struct() if kind == _STRUCT else self._integer()

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _take(self, count: int) -> bytes:
        if count > len(self._content) - self._at:
            raise IndexError(count)
        self._at += count
        return self._content[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128 and shift < _LONGEST:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
