"""What several commands share: their arguments, and how they read models and speak to people."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.calib.printable import printable_lines
from calibcast.engines.colour import painted
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


def fail(message: str) -> None:
    """Print why the command failed to stderr: `error: ` and the message, the same for every command."""
    with suppress(OSError):
        typer.echo(f"{painted('error:', 'red', sys.stderr)} {printable_lines(message)}", err=True)


def note(message: str) -> None:
    """Say something on stderr: stdout is for results."""
    with suppress(OSError):  # where stderr cannot be written, nothing can be said
        typer.echo(printable_lines(message), err=True)


# What messages of the Python calls speak of, and what has no parameter of its own on the command line.
_SETTINGS = {
    "decompose_attention=True": "--setting decompose_attention=True",
    "transform=lambda": "--transform FILE.py:FUNCTION, a function such as lambda",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of a Python call for the command line: `transform=` is `--transform` here, `cache=False` `--no-cache`.

    flags: of each parameter of the commands, by its name in Python; of a switch that is off, by `no_` and its name.
    """
    for python, flag in _SETTINGS.items():
        message = message.replace(python, flag)
    names = "|".join(sorted(map(re.escape, {name.removeprefix("no_") for name in flags}), key=len, reverse=True))
    # Between quotes are the user's own names, and so they may be after a dot or a dash.
    assigned = re.compile(rf"(?<![\w.'\"-])({names})=('[^']*'|\"[^\"]*\"|[^\s,;:()]*[^\s,;:().])?")
    message = assigned.sub(lambda found: _as_flag(found[1], found[2] or "", flags), message)
    words = re.compile(rf"(?<![\w.'\"-])({names})(?![\w.'\"=-])")
    return words.sub(lambda found: flags.get(found[1], found[1]) if "_" in found[1] else found[1], message)


def _as_flag(name: str, value: str, flags: Mapping[str, str]) -> str:
    if value == "False" and f"no_{name}" in flags:
        return flags[f"no_{name}"]
    if name not in flags:
        return f"{name}={value}"
    value = value.strip("'\"")
    return flags[name] if value in {"", "True"} else f"{flags[name]} {value}"


def existing(expected: str) -> Callable[[Any], Any]:
    """A check of a file's argument, before torch is imported: raises LocationError where there is no such file."""

    def check(value: Any) -> Any:
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, Path) and not path.is_file():
                what = "is a folder" if path.is_dir() else "no such file"
                raise LocationError(f"{path}{' ' if path.is_dir() else ': '}{what}; expected {expected}")
        return value

    return check


RANGES = existing("a ranges file written by calibcast calibrate")
PLAN = existing("a plan written by calibcast plan -o")


def check_device(device: str | None) -> None:
    """Raise UsageError for what names no kind of device. Whether this machine has it is seen later."""
    import torch

    if device is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"--device {device}: give cpu, cuda or cuda:1") from error


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
    """Before hours of work, not after: is there a folder to write into?"""
    folder = output.parent
    if not folder.is_dir():
        raise LocationError(f"{output}: there is no folder {folder}")


def check_file(output: Path | None) -> None:
    """The same for a file, which does not take the place of a folder."""
    if output is not None:
        check_folder(output)
        if output.is_dir():
            raise LocationError(f"{output} is a folder; give the name of a file to write")
