"""How much memory a Parquet file would take, from its footer: a few kilobytes can declare gigabytes.

Columns are compressed, and equal values in a row cost nothing. So what a file declares is looked at before polars makes
room for it.
"""

from __future__ import annotations

from typing import Any

# A file may declare so many bytes, whatever its size: a table of some 30,000 tensors.
_FREE = 64 << 20
# A row of a range table has 2 KB, most of it zeros in a histogram, and takes at least 100 bytes in the file.
_RATIO = 50
_WIDTH = 8  # bytes of a number


def declared_too_much(content: bytes) -> str | None:
    """How many bytes a Parquet file declares, for a message, where no table of calibcast has so many; else None.

    Raises ValueError or OSError (of pyarrow) for a footer that cannot be read.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    footer: Any = parquet.read_metadata(arrow.BufferReader(content))
    held = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunks = [group.column(column) for column in range(group.num_columns)]
        held += sum(max(chunk.num_values * _WIDTH, chunk.total_uncompressed_size) for chunk in chunks)
    if held <= _FREE + _RATIO * len(content):
        return None
    return f"it declares {held} bytes of values, and has {len(content)}"
