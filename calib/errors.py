"""Every error that calibcast raises on purpose. Catch the base to catch them all.

CalibcastError
├── ProgramError    the exported program cannot be used: train mode, no floating-point tensor, or a node failed
├── BatchError      a batch or the dataloader: count, dtype, shape, key, or it raised (`ranges`: what was measured)
├── ArtifactError   a file is truncated, foreign, newer, or not what it claims to be
│   ├── ChangedFileError  a file is not the one that its manifest was written for (a MismatchError as well)
│   └── StorageError  a file cannot be written, a store not reached, or a job's own folder is damaged
├── MismatchError   two things that do not belong together: ranges, plan or engine of another program
├── PlanError       a plan cannot be made or used: unknown name, target, pattern, dtype
│   ├── SettingError  a setting is out of range, or names something that does not exist
│   └── BudgetError   no plan meets the budget (`proof`, `edges`: the best there is, and what costs most)
├── BuildError      an engine cannot be built: unknown backend, missing package, the builder said no
└── GateError       a gate that the user set said no (`report`: the evidence)
"""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from traceback import walk_tb
from typing import Any

# Folders with code that is not the user's: Python's own, installed packages, calibcast.
_INSTALLED = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[1]))


class CalibcastError(Exception):
    """Base of all calibcast errors."""


class ProgramError(CalibcastError):
    """The exported program itself cannot be used."""


class BatchError(CalibcastError):
    """A batch does not fit the program, or the dataloader failed.

    `ranges` is the RangeTable of the batches before the failing one, or None when there were none.
    """

    def __init__(self, message: str, ranges: Any = None) -> None:
        super().__init__(message)
        self.ranges = ranges


class ArtifactError(CalibcastError):
    """A file is truncated, foreign, of another schema version, or not what it claims to be."""


class MismatchError(CalibcastError):
    """Two artifacts, or an artifact and a program, do not belong together."""


class ChangedFileError(ArtifactError, MismatchError):
    """A file is not the one that its manifest was written for: damaged, or put there by someone else."""


class PlanError(CalibcastError):
    """A plan cannot be made or used as asked."""


class SettingError(PlanError):
    """A setting of a plan is out of range, or names something that does not exist."""


class StorageError(ArtifactError):
    """A file cannot be written, a store not reached, or a job's own folder is damaged: no given file is wrong."""


class BuildError(CalibcastError):
    """An engine cannot be built as asked."""


class GateError(CalibcastError):
    """A gate that the user set said no. `report` holds the evidence."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class BudgetError(PlanError, GateError):
    """No plan meets the user's budget of rounding noise.

    `report` and `proof` both hold the proof of the best plan. `edges` are the edges that cost most under that plan.
    """

    def __init__(self, message: str, proof: Any = None, edges: Iterable[Any] = ()) -> None:
        super().__init__(message, proof)
        self.proof, self.edges = proof, tuple(edges)


def known(name: str, names: Iterable[str], most: int = 8) -> str:
    """The end of a message about an unknown name: the names that exist, those nearest to `name` first."""
    every = sorted(set(names))
    near = difflib.get_close_matches(name, every, n=most, cutoff=0.4)
    if near:
        return f"near names: {', '.join(near)}"
    shown = ", ".join(every[:most])
    return f"known: {shown}{f' and {len(every) - most} more' if len(every) > most else ''}"


def require_kind(value: Any, kind: type, argument: str, remedy: str, error: type[CalibcastError]) -> None:
    """Raise `error` unless `value` is a `kind`. It says what came for which argument, and how to get what is needed."""
    if not isinstance(value, kind):
        came = "None" if value is None else f"a {type(value).__name__}"
        raise error(f"{argument} is {came}, expected a {kind.__name__}. {remedy}")


def raised_at(error: BaseException) -> str:
    """Where the user's own code raised `error`, as ` (file.py:12)`: the innermost line outside installed packages, or
    the innermost of all. "" for an error without a traceback, such as one from another process."""
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    own = [place for place in places if not place[0].startswith((*_INSTALLED, "<"))]
    return "".join(f" ({file}:{line})" for file, line in (own or places)[-1:])


def cause_of(error: BaseException) -> BaseException:
    """The first error of a chain: the libraries that write programs put the graph and their own calls around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its `repr` where it has none. Libraries append whole stack traces."""
    return (str(error).strip() or repr(error)).splitlines()[0]
