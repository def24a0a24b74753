"""What several commands share: their arguments, how they read models, and how they print messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.calib.file_kinds import ENGINE, Expected, wrong_kind
from calibcast.calib.file_kinds import PLAN as PLAN_FILE
from calibcast.calib.file_kinds import RANGES as RANGES_FILE
from calibcast.calib.printable import printable_lines
from calibcast.calib.terminal_text import wrapped
from calibcast.engines.colour import painted
from calibcast.engines.streams import fitted
from calibcast.engines.usage import LocationError, UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a .pt2 file, or file.py:function")]
Data = Annotated[str, typer.Option("--data", metavar="LOC", help="file.py:function that returns a dataloader")]
Transform = Annotated[
    str | None,
    typer.Option("--transform", metavar="LOC", help="file.py:function from a batch to the model's inputs"),
]
CarryState = Annotated[
    bool,
    typer.Option(
        "--carry-state",
        help="the batches are sequences: each goes on from what the one before left in the "
        "model's buffers, so that errors add up",
    ),
]
MaxBatches = Annotated[int | None, typer.Option("--max-batches", min=1, help="stop after so many batches")]


def say(text: str) -> None:
    """Print a result, as wide as the terminal. Names in it may contain control characters, which are removed."""
    typer.echo(wrapped(printable_lines(text)))


def fail(message: str) -> None:
    """Print why the command failed to stderr: `error: ` and the message, the same for every command."""
    with suppress(OSError):
        text = fitted(f"error: {printable_lines(message)}", sys.stderr)
        typer.echo(painted("error:", "red", sys.stderr) + text.removeprefix("error:"), err=True)


def note(message: str) -> None:
    """Print a message to stderr, since stdout is for results."""
    with suppress(OSError):  # if stderr cannot be written, there is no place for a message
        typer.echo(fitted(printable_lines(message), sys.stderr), err=True)


# Words in messages of the Python calls that match no parameter of the command line -> what to write there.
_SETTINGS = {
    "decompose_attention=True": "--setting decompose_attention=True",
    "transform=lambda": "--transform FILE.py:FUNCTION, a function such as lambda",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of a Python call, reworded for the command line: `transform=` becomes `--transform`, `cache=False`
    becomes `--no-cache`.

    flags: name in Python -> flag, for each parameter of the commands. A switch that turns something off has `no_`
    before its name.
    """
    for python, flag in _SETTINGS.items():
        message = message.replace(python, flag)
    names = "|".join(sorted(map(re.escape, {name.removeprefix("no_") for name in flags}), key=len, reverse=True))
    # Skip names in quotes, or after a dot or a dash: those may be the user's own.
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


def existing(expected: str, kind: Expected) -> Callable[[Any], Any]:
    """A check for an argument that names a file. It runs before torch is imported, and raises LocationError where there
    is no such file, or one of another kind."""

    def check(value: Any) -> Any:
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, Path) and not path.exists():
                raise LocationError(f"{path}: no such file; expected {expected}")
            if isinstance(path, Path) and (wrong := wrong_kind(path, kind)) is not None:
                raise LocationError(wrong)
        return value

    return check


RANGES = existing("a ranges file written by calibcast calibrate", RANGES_FILE)
PLAN = existing("a plan written by calibcast plan -o", PLAN_FILE)


def check_device(device: str | None) -> None:
    """Raise UsageError for text that names no kind of device. It does not check that this machine has the device."""
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
    """Check that these files exist, before torch is imported, which takes seconds. Raises LocationError."""
    from calibcast.engines.locations import check_location, check_model

    check_model(model)
    for location in (data, transform):
        if location is not None:
            check_location(location)


def check_engine(folder: Path) -> None:
    """Raise LocationError unless `folder` is an engine's folder."""
    if not folder.exists():
        raise LocationError(f"{folder}: no such folder; expected an engine written by calibcast build")
    if folder.is_dir() and not (folder / "manifest.json").is_file():
        raise LocationError(f"{folder} is not an engine folder: it has no manifest.json")
    if (wrong := wrong_kind(folder, ENGINE)) is not None:
        raise LocationError(wrong)


def inputs(model: str, data: str, transform: str | None) -> tuple[Any, Any, Any]:
    """The program, the dataloader and the transform (or None) at these locations."""
    from calibcast.engines.locations import load_data, load_model

    function = transform_at(transform)  # first, as it is quick
    return load_model(model), load_data(data), function


def transform_at(location: str | None) -> Any:
    """The transform at this location; None where there is none."""
    from calibcast.engines.locations import load_function

    return None if location is None else load_function(location)


def check_folder(output: Path) -> None:
    """Raise LocationError unless there is a folder to write into: before hours of work, not after."""
    folder = output.parent
    if not folder.is_dir():
        raise LocationError(f"{output}: there is no folder {folder}")


def check_writable_folder(folder: Path) -> None:
    """Raise LocationError where a file stands in the place of a folder to write into."""
    if folder.exists() and not folder.is_dir():
        raise LocationError(f"{folder} is a file; give the name of a folder")


def check_file(output: Path | None) -> None:
    """The same for a file: also raise where `output` itself is a folder."""
    if output is not None:
        check_folder(output)
        if output.is_dir():
            raise LocationError(f"{output} is a folder; give the name of a file to write")
