"""Running an engine once, beside its program: a remedy that gives an engine need not give a right one.

TensorRT-RTX 1.4 makes an engine of a NAFNet in bf16 once its grouped convolutions are in fp32, and that engine gives
NaN for whatever it is given.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from calib.batches import Leaf, Signature
from calib.execution import NodeError, ProgramRunner, input_structure
from calib.ranges import RangeTable
from engines.builder_job import Profile

_log = logging.getLogger("calibcast")


def trial_inputs(
    signature: Signature, shapes: Sequence[Profile], ranges: RangeTable | None, device: torch.device
) -> list[Any]:
    """Flat inputs of the most frequent sizes: uniform between what calibration saw, else between -1 and 1; whole
    numbers are 0, which is a place in every table."""
    generator = torch.Generator().manual_seed(0)

    def made(leaf: Leaf, shape: tuple[int, ...]) -> Any:
        if leaf.dtype is None:
            return shape[0] if leaf.sizes else leaf.constant
        if not leaf.dtype.is_floating_point:
            return torch.zeros(shape, dtype=leaf.dtype, device=device)
        low, high = _seen(leaf.name, ranges)
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device, leaf.dtype)

    return [made(leaf, usual) for leaf, (_, usual, _) in zip(signature.leaves, shapes, strict=True)]


def _seen(name: str, ranges: RangeTable | None) -> tuple[float, float]:
    """The least and the largest value of an input."""
    rows = None if ranges is None else ranges.frame.filter((pl.col("kind") == "input") & (pl.col("node") == name))
    found = (-1.0, 1.0) if rows is None or not len(rows) else (rows["min"][0], rows["max"][0])
    return found if all(value is not None and math.isfinite(value) for value in found) else (-1.0, 1.0)


def trial_problem(run: Callable[..., Any], program: ExportedProgram, flat: Sequence[Any]) -> str | None:
    """What is wrong with an engine: it raises, or gives NaN or Inf where its program gives numbers. None: neither, or
    its program does not run on these inputs.

    flat: inputs on the device of the engine, to which a copy of the program is moved.
    """
    device = next((value.device for value in flat if isinstance(value, torch.Tensor)), None)
    try:
        wanted = ProgramRunner(program, device).run(flat)
    except (NodeError, RuntimeError) as error:  # not the engine's fault, such as a lack of memory
        _log.warning("the engine was not tried out, as its program does not run on such inputs: %s", error)
        return None
    args, kwargs = input_structure(program, flat)
    try:
        given = pytree.tree_leaves(run(*args, **kwargs))
    except Exception as error:  # the runtime's own, whatever it is
        return f"the engine does not run: {type(error).__name__}: {error}"
    wrong = sum(int((~torch.isfinite(ours) & torch.isfinite(theirs)).sum()) for ours, theirs in _pairs(given, wanted))
    total = sum(theirs.numel() for _, theirs in _pairs(given, wanted))
    return f"the engine gives NaN or Inf for {wrong} of {total} values that its program gives" if wrong else None


def _pairs(given: Sequence[Any], wanted: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (ours, theirs)
        for ours, theirs in zip(given, wanted, strict=True)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and theirs.is_floating_point()
    ]
