"""What several commands share: their arguments, and how they read models and speak to people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.calib.printable import printable_lines
from calibcast.engines.usage import LocationError, UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a .pt2 file, or file.py:function")]
Data = Annotated[str, typer.Option("--data", metavar="LOC", help="file.py:function that returns a dataloader")]
Transform = Annotated[
    str | None,
    typer.Option("--transform", metavar="LOC", help="file.py:function from a batch to the model's inputs"),
]
MaxBatches = Annotated[int | None, typer.Option("--max-batches", min=1, help="stop after so many batches")]


def say(text: str) -> None:
    """Print a result. Names in it may hold anything, also what a terminal obeys: that is left out."""
    typer.echo(printable_lines(text))


def note(message: str) -> None:
    """Say something on stderr: stdout is for results."""
    with suppress(OSError):  # where stderr cannot be written, nothing can be said
        typer.echo(printable_lines(message), err=True)


# What messages of the Python calls speak of, as the command line has it.
_ARGUMENTS = re.compile(
    r"\b(transform|max_batches|min_sqnr_db|data_max|init_max|device|nodes_to_exclude|nodes_to_include)=(?=[\s,.;:)]|$)"
)
_SETTINGS = {
    "cache=False": "--no-cache",
    "ahead_of_time=True": "--ahead-of-time",
    "allow_unknown=True": "--allow-unknown",
    "strict_precision=True": "--strict-precision",
    'on_failure="fallback"': "--on-failure fallback",
    "on_failure='fallback'": "--on-failure fallback",
    "decompose_attention=True": "--setting decompose_attention=True",
}


def in_flags(message: str) -> str:
    """A message of a Python call for the command line: `transform=` is `--transform` here."""
    for python, flag in _SETTINGS.items():
        message = message.replace(python, flag)
    return _ARGUMENTS.sub(lambda found: "--" + found[1].replace("_", "-"), message)


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError unless `value` is one of the `choices` of an option."""
    known = tuple(choices)
    if value not in known:
        raise UsageError(f"{option} {value}: known are {', '.join(known)}")


def check_inputs(model: str, data: str | None = None, transform: str | None = None) -> None:
    """Before torch is imported, which takes seconds: are there such files? Raises LocationError."""
    from calibcast.engines.locations import check_location, check_model

    check_model(model)
    for location in (data, transform):
        if location is not None:
            check_location(location)


def check_engine(folder: Path) -> None:
    """Raise LocationError unless `folder` is an engine's."""
    if not folder.exists():
        raise LocationError(f"{folder}: no such folder; expected an engine written by calibcast build")
    if not (folder / "manifest.json").is_file():
        what = "a file" if folder.is_file() else "not an engine folder: it has no manifest.json"
        raise LocationError(f"{folder} is {what}; expected an engine written by calibcast build")


def inputs(model: str, data: str, transform: str | None) -> tuple[Any, Any, Any]:
    """The program, the dataloader and the transform (or None) at these locations."""
    from calibcast.engines.locations import load_data, load_function, load_model

    function = None if transform is None else load_function(transform)
    return load_model(model), load_data(data), function


def check_folder(output: Path) -> None:
    """Before hours of work, not after: can the result be written?"""
    folder = output.parent
    if not folder.is_dir():
        raise LocationError(f"{output}: there is no folder {folder}")
