"""Read a NumPy `.npz` as `numpy.savez` writes it, and check every size before memory is allocated for it.

NumPy itself unpacks as much as a small file declares, and allocates any shape that a header states.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np

_SUFFIX = ".npy"
_NUMBERS = "biuf"


def read_npz(content: bytes) -> dict[str, Any]:
    """The arrays of an uncompressed archive, by name. Raises ValueError or zipfile.BadZipFile for anything else."""
    arrays: dict[str, Any] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("its members declare more bytes than the file has: it is compressed, or made to look so")
        for entry in entries:
            name = entry.filename.removesuffix(_SUFFIX)
            if entry.compress_type != zipfile.ZIP_STORED or not entry.filename.endswith(_SUFFIX) or name in arrays:
                raise ValueError(f"{entry.filename!r} is none of its arrays: compressed, a duplicate, or another file")
            arrays[name] = _array(_member(archive, entry), name)
    return arrays


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(entry)
    except zipfile.BadZipFile as error:
        raise ValueError(f"the CRC of {entry.filename} is not that of its bytes ({error})") from error


def _array(member: bytes, name: str) -> Any:
    stream = io.BytesIO(member)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"array {name} is of format {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in _NUMBERS or (fortran and len(shape) > 1):
        raise ValueError(f"array {name} holds {dtype}, no plain numbers in rows")
    count, held = 1, len(member) - stream.tell()
    for size in shape:
        count *= size
    if count * dtype.itemsize != held:
        raise ValueError(f"array {name} declares the shape {shape} of {dtype}, and has {held} bytes")
    return np.frombuffer(member, dtype, offset=stream.tell()).reshape(shape)
