"""The zip container of torch: what is in it, and whether it is as plain as the one that torch writes.

torch stores members uncompressed. So if members need more memory than the file has bytes, torch did not write the file.
Two readers could disagree about a member (one name twice, names that differ only in their case, a path that leads out).
Such members are refused.
"""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path
from typing import IO

from calibcast.calib.pt2.refusal import RefusedError, shown

MOST_MEMBERS = 200_000
_ENCRYPTED = 0x1


def members(source: Path | IO[bytes]) -> dict[str, int]:
    """The size in bytes of every member, by its name without the root folder.

    Raises RefusedError for what torch would not have written, and zipfile.BadZipFile or OSError for a file that is not
    a zip archive.
    """
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        length = _length(source)
    if len(entries) > MOST_MEMBERS:
        raise RefusedError(f"the archive has {len(entries)} members, more than {MOST_MEMBERS}")
    sizes: dict[str, int] = {}
    roots, folded = set(), set()
    for entry in entries:
        _check(entry)
        root, _, name = entry.filename.partition("/")
        if not name:
            raise RefusedError(f"member {shown(entry.filename)} lies outside the archive's one folder")
        roots.add(root)
        folded.add(name.casefold())
        sizes[name] = entry.file_size
    if len(roots) != 1:
        raise RefusedError(f"the archive has {len(roots)} top folders; torch writes one")
    if len(folded) != len(entries):
        raise RefusedError("two members of the archive have the same name")
    if sum(sizes.values()) > length:
        raise RefusedError(f"members declare {sum(sizes.values())} bytes, and the whole file has {length}")
    return sizes


def _check(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    # The root folder has the name that the file had when it was written, which may be anything.
    if name != entry.filename or not name.isprintable() or "\\" in name:
        raise RefusedError(f"member {shown(name)} has no plain name")
    if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise RefusedError(f"member {shown(name)} leads out of the archive, or is a folder")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise RefusedError(f"member {shown(name)} is a symbolic link")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise RefusedError(
            f"member {shown(name)} is compressed ({entry.compress_size} bytes for {entry.file_size}); torch stores "
            "members as they are. Save the program again with torch.export.save"
        )
    if entry.flag_bits & _ENCRYPTED:
        raise RefusedError(f"member {shown(name)} is encrypted")


def _length(source: Path | IO[bytes]) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    return source.seek(0, 2)
