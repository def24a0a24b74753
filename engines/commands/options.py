"""What several commands share: their arguments, and how they read models and speak to people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from calibcast.engines.usage import LocationError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a .pt2 file, or file.py:function")]
Data = Annotated[str, typer.Option("--data", metavar="LOC", help="file.py:function that returns a dataloader")]
Transform = Annotated[
    str | None,
    typer.Option("--transform", metavar="LOC", help="file.py:function from a batch to the model's inputs"),
]
MaxBatches = Annotated[int | None, typer.Option("--max-batches", min=1, help="stop after so many batches")]


def note(message: str) -> None:
    """Say something on stderr: stdout is for results."""
    typer.echo(message, err=True)


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
