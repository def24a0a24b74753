"""`calibcast merge`: one range table from range tables and from checkpoints that a job left behind."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from calibcast.calib.checkpoint import Checkpoint, merge_checkpoints
from calibcast.calib.errors import MismatchError
from calibcast.calib.file_kinds import CHECKPOINT, kind_of
from calibcast.calib.ranges import RangeTable
from calibcast.engines.usage import UsageError

_log = logging.getLogger("calibcast")


def merge_files(paths: Sequence[Path]) -> RangeTable:
    """One table from range tables and checkpoints of one program.

    Checkpoints of one run keep their batch numbers; each following table's numbers continue after the earlier ones.
    Raises ArtifactError for a file that is neither, UsageError for one that is given twice, MismatchError for files of
    different programs or two of the same process.
    """
    shards = {path: Checkpoint.load(path) for path in paths if kind_of(path) == CHECKPOINT}
    tables = {path: RangeTable.load(path) for path in paths if path not in shards}
    _refuse_repeated(paths, shards)
    for path, shard in shards.items():
        _log.warning("%s holds %d batches of a run that did not end", path, shard.position)
    whole = [merge_checkpoints(list(shards.values())).table()] if shards else []
    every = [*whole, *tables.values()]
    _warn_shared(every)
    return RangeTable.merge(every)


def _refuse_repeated(paths: Sequence[Path], shards: dict[Path, Checkpoint]) -> None:
    repeated = [path for path, times in Counter(path.resolve() for path in paths).items() if times > 1]
    if repeated:
        raise UsageError(f"{repeated[0]} is given twice: its batches would count twice")
    seen: dict[object, Path] = {}
    for path, shard in shards.items():
        place = (shard.notes.get("rank"), shard.notes.get("world"))
        if place[0] is not None and place in seen:
            raise MismatchError(
                f"{seen[place]} and {path} are both of process {place[0]} of {place[1]}: batches would count twice"
            )
        seen[place] = path


def _warn_shared(tables: Sequence[RangeTable]) -> None:
    hashes = Counter(digest for table in tables for digest in set(table.calibration.input_hashes))
    shared = sum(1 for times in hashes.values() if times > 1)
    if shared:
        _log.warning("%d batches are in more than one of the tables, and count more than once", shared)
