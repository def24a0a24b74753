"""From a batch of a dataset to the model's inputs: first the transform, then the columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from calibcast.calib.batches import Signature
from calibcast.calib.errors import BatchError, known
from calibcast.calib.graph import dtype_name
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.settings import Data, Source


@dataclass(frozen=True)
class Inputs:
    """Makes the model's inputs from a batch: the `transform` of calibration and verification.

    columns: model input -> column, or several columns to stack along a new last dimension; None: the batch itself is
    the input.
    """

    signature: Signature
    columns: Mapping[str, str | tuple[str, ...]] | None
    transform: Callable[[Any], Any] | None

    def __call__(self, batch: Any) -> Any:
        """The inputs of `batch`. Raises BatchError when a column is missing or is not a tensor."""
        made = batch if self.transform is None else self.transform(batch)
        if self.columns is None or not isinstance(made, Mapping):
            return made
        return {name: self._column(made, name, column) for name, column in self.columns.items()}

    def _column(self, batch: Mapping[str, Any], name: str, column: str | tuple[str, ...]) -> Any:
        if isinstance(column, tuple):
            parts = [self._column(batch, name, one) for one in column]
            return torch.stack(parts, dim=-1)
        if column not in batch:
            raise BatchError(f"no column {column!r} for the input {name}; there are {', '.join(map(str, batch))}")
        value = batch[column]
        if not isinstance(value, torch.Tensor):
            what = f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__
            raise BatchError(
                f"column {column!r} for the input {name} is {what}, no tensor: text, or rows of different sizes. "
                "Make it a tensor in transform."
            )
        wanted = next((leaf.dtype for leaf in self.signature.leaves if leaf.name == name), None)
        # Files such as CSV do not distinguish 1 from 1.0, so integers are cast where the model takes floats.
        whole = not (value.is_floating_point() or value.is_complex())
        return value.to(wanted) if wanted is not None and wanted.is_floating_point and whole else value


def inputs_of(
    source: Source, signature: Signature, columns: tuple[str, ...] | None, transform: Callable[[Any], Any] | None
) -> Inputs:
    """How batches of `source`, which has these columns (None: unknown), become inputs.

    Raises JobError when `columns` names an input that the model does not have, or when nothing says which column feeds
    an input.
    """
    for name in source.columns:
        if name not in signature.names:
            raise JobError(f"{_table(source)} columns: the model has no input {name!r}; it takes {signature}")
    if source.columns:
        if columns is not None and transform is None:
            _refuse_missing(source, columns)
        return Inputs(signature, dict(source.columns), transform)
    if source.kind == "loader" or transform is not None:
        return Inputs(signature, None, transform)
    missing = [] if columns is None else [name for name in _required(signature) if name not in columns]
    if missing:
        shown = ", ".join(columns or ())
        raise JobError(
            f"{_table(source)}: no column is named like the input {missing[0]!r} of the model {signature}; there are "
            f"{shown}. "
            f'Say which one feeds it: columns = {{ {missing[0]} = "..." }}, or give transform.'
        )
    names = signature.names if columns is None else [name for name in signature.names if name in columns]
    return Inputs(signature, {name: name for name in names}, None)


def _table(source: Source) -> str:
    return "[data]" if isinstance(source, Data) else "[held_out]"


def _refuse_missing(source: Source, columns: tuple[str, ...]) -> None:
    for name, wanted in source.columns.items():
        for column in (wanted,) if isinstance(wanted, str) else wanted:
            if column not in columns:
                raise JobError(
                    f"{_table(source)} columns: no column {column!r} for the input {name}; {known(column, columns)}"
                )


def _required(signature: Signature) -> list[str]:
    """The inputs that data must give: those that hold a tensor. Constants of the export need not be given."""
    tensors = {leaf.name for leaf in signature.leaves if leaf.dtype is not None}
    return [name for name in signature.names if name in tensors or not any(n.startswith(name) for n in tensors)]


def shown_inputs(signature: Signature) -> str:
    """The inputs of a model as text."""
    return ", ".join(f"{leaf.name} {dtype_name(leaf.dtype)}" for leaf in signature.leaves if leaf.dtype is not None)
