"""The state of a calibration as one file: written whole, read without pickle, and resumed bit for bit."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibcast.calib.artifacts import SCHEMA_VERSION, check_header, parsed, written_whole
from calibcast.calib.errors import ArtifactError, MismatchError
from calibcast.calib.file_kinds import CHECKPOINT_FILE, require_file
from calibcast.calib.graph import TensorSpec
from calibcast.calib.json_types import require_types
from calibcast.calib.measured import Measured, merge_measured
from calibcast.calib.plain_npz import read_npz
from calibcast.calib.range_schema import Calibration
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_edges import Edge
from calibcast.calib.rounding_statistics import RoundingRecord, RoundingStatistics
from calibcast.calib.statistics import Statistics

_KIND = "checkpoint"
_HEADER, _TOTAL, _ROUNDING = "header", "total", "rounding"
_HEADER_TYPES: dict[str, Any] = {
    "specs": list[TensorSpec],
    "position": int,
    "made_of": dict[str, str],
    "last": str,
    "early": list[int],
    "notes": dict[str, Any],
}


@dataclass(frozen=True)
class Checkpoint(Measured):
    """What a calibration has measured after `position` batches of its loader, skipped batches included.

    made_of: fingerprints of what is calibrated, and how; a run with other fingerprints must not go on from here. last:
    a hash of the last batch, to notice a loader whose order does not repeat. early: statistics at earlier positions.
    notes: the caller's own data, as JSON values.
    """

    position: int
    made_of: Mapping[str, str] = field(default_factory=dict)
    last: str = ""
    early: Mapping[int, Statistics] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """A NumPy `.npz` archive: a JSON header, and every array of the statistics under its field's name."""
        header = {
            "calibcast": _KIND,
            "schema": SCHEMA_VERSION,
            "specs": [asdict(spec) for spec in self.specs],
            "calibration": asdict(self.calibration),
            "position": self.position,
            "made_of": dict(self.made_of),
            "last": self.last,
            "early": list(self.early),
            "notes": dict(self.notes),
            "rounding": _rounding_header(self.rounding),
        }
        arrays = _arrays(_TOTAL, self.statistics)
        arrays |= {f"{_ROUNDING}.{name}": array.numpy() for name, array in self.rounding.statistics.arrays().items()}
        for position, statistics in self.early.items():
            arrays |= _arrays(str(position), statistics)
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **{_HEADER: text}, **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, source: Path) -> Checkpoint:
        """Read what `to_bytes` gave. Raises ArtifactError, naming `source`, when it is truncated or something else."""
        try:
            arrays = read_npz(content)
            header = json.loads(arrays.pop(_HEADER).tobytes())
        except Exception as error:  # the zip reader raises whatever it meets: NotImplementedError, RuntimeError, ..
            raise ArtifactError(f"{source} is not a readable checkpoint (truncated or foreign): {error}") from error
        check_header(header if isinstance(header, dict) else {}, _KIND, source)
        with parsed(source, _KIND):
            require_types(header, _HEADER_TYPES)
            rows = len(header["specs"])
            return cls(
                specs=tuple(TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in header["specs"]),
                statistics=_statistics(_TOTAL, arrays, rows),
                calibration=Calibration.parsed(header["calibration"]),
                position=int(header["position"]),
                made_of=header["made_of"],
                last=header["last"],
                early={int(position): _statistics(str(position), arrays, rows) for position in header["early"]},
                notes=header["notes"],
                rounding=_rounding(header.get("rounding"), arrays),
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the checkpoint, whole or not at all, and through to the disk. Raises ArtifactError."""
        content = self.to_bytes()
        with written_whole(path) as temporary, temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # without fsync, a power cut can keep the rename and lose the bytes

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint. Raises ArtifactError when it is missing, truncated, foreign or newer."""
        source = Path(path)
        if not source.exists():
            raise ArtifactError(f"{source}: no such file; expected a checkpoint of a calibration")
        require_file(source, CHECKPOINT_FILE)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{source} cannot be read: {error}") from error
        return cls.from_bytes(content, source)

    def table(self) -> RangeTable:
        """The ranges measured so far."""
        return RangeTable(**vars(self.data()))

    def difference(self, made_of: Mapping[str, str]) -> str | None:
        """The name of the first fingerprint that differs between `made_of` and this checkpoint; None if all agree."""
        for name in [*made_of, *self.made_of]:
            if made_of.get(name) != self.made_of.get(name):
                return name
        return None


def merge_checkpoints(parts: Sequence[Checkpoint]) -> Checkpoint:
    """Merge the checkpoints of the shards of one run. No two shards have a batch of the same number.

    Counts, min, max and histograms are exact in any order of the shards; sums are within 1e-12 relative. `early` and
    `notes` are left to the caller. Raises MismatchError for shards of different runs.
    """
    if not parts:
        raise MismatchError("nothing to merge: give at least one checkpoint")
    first = parts[0]
    for number, part in enumerate(parts[1:], 1):
        if (named := first.difference(part.made_of)) is not None:
            raise MismatchError(f"shard {number} belongs to another run than shard 0: {named} is not the same")
    whole = merge_measured(parts, "shard")
    return Checkpoint(**vars(whole), position=sum(part.position for part in parts), made_of=first.made_of)


def copy_into(total: Statistics, other: Statistics) -> None:
    """Make `total` equal to `other` bit for bit, in its own memory and on its own device."""
    for name, array in total.arrays():
        array.copy_(getattr(other, name))


def _arrays(prefix: str, statistics: Statistics) -> dict[str, Any]:
    return {f"{prefix}.{name}": array.detach().cpu().numpy() for name, array in statistics.arrays()}


def _statistics(prefix: str, arrays: Mapping[str, Any], rows: int) -> Statistics:
    own = {name.removeprefix(f"{prefix}."): a for name, a in arrays.items() if name.startswith(f"{prefix}.")}
    names = {item.name for item in fields(Statistics)}
    # The array of histograms may be missing. If another array is missing, another version wrote the file.
    if set(own) | {"histograms"} != names | {"histograms"}:
        raise ValueError(f"arrays {sorted(own)}, expected {sorted(names)}")
    empty = dict(Statistics.empty(0, histogram=True).arrays())
    for name, array in own.items():
        if array.shape != (rows, *empty[name].shape[1:]):
            raise ValueError(f"{name} has the shape {array.shape}, and there are {rows} tensors")
    tensors: dict[str, Any] = {name: torch.from_numpy(own[name].copy()) if name in own else None for name in names}
    return Statistics(**tensors)


def _rounding_header(record: RoundingRecord) -> dict[str, Any]:
    missing = {str(row): reason for row, reason in record.statistics.missing.items()}
    edges = [list(edge.key) for edge in record.edges]
    return {"edges": edges, "apart": record.apart, "seen": record.seen, "missing": missing}


def _rounding(header: Mapping[str, Any] | None, arrays: Mapping[str, Any]) -> RoundingRecord:
    """The rounding record of a checkpoint; empty for a version that did not measure rounding."""
    if header is None:
        return RoundingRecord()
    edges = tuple(Edge(str(node), str(name), int(output)) for node, name, output in header["edges"])
    found = RoundingStatistics.empty(len(edges), 1)
    # Earlier versions did not write how much is estimated; a calibration that stopped half-way has no estimates.
    names = [name for name in found.arrays() if name != "estimated" or f"{_ROUNDING}.{name}" in arrays]
    own = {name: torch.from_numpy(arrays[f"{_ROUNDING}.{name}"].copy()) for name in names}
    missing = {int(row): str(reason) for row, reason in header["missing"].items()}
    statistics = replace(found, missing=missing, **own)
    return RoundingRecord(edges, bool(header["apart"]), statistics, int(header["seen"]))


class Pace:
    """When the next checkpoint is due: after `batches` batches or `seconds` seconds, whichever comes first."""

    def __init__(self, batches: int, seconds: float) -> None:
        self._batches, self._seconds = batches, seconds
        self._count, self._since = 0, time.monotonic()

    def tick(self) -> bool:
        """Count one batch. True when a checkpoint is due."""
        self._count += 1
        return self._count >= self._batches or time.monotonic() - self._since >= self._seconds

    def reset(self) -> None:
        """Start to count again, because a checkpoint was written."""
        self._count, self._since = 0, time.monotonic()
