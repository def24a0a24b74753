"""Running an engine once, beside its program: that one was built does not make it right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import signature_of
from calibcast.calib.execution import NodeError, ProgramRunner, input_structure
from calibcast.calib.input_checks import Leaf
from calibcast.calib.ranges import RangeTable
from calibcast.engines.tensorrt.builder.job import Profile
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")


def trial_inputs(
    program: ExportedProgram, shapes: Sequence[Profile], ranges: RangeTable | None, device: torch.device
) -> list[Any]:
    """Flat inputs of the most frequent sizes: uniform between what calibration saw, else between -1 and 1.

    Whole numbers are 0, which is a place in every table; truth values are true, which masks nothing out.
    """
    generator = torch.Generator().manual_seed(0)

    def made(leaf: Leaf, node: str, shape: tuple[int, ...]) -> Any:
        if leaf.dtype is None:
            return shape[0] if leaf.sizes else leaf.constant
        if not leaf.dtype.is_floating_point:
            return torch.full(shape, leaf.dtype == torch.bool, dtype=leaf.dtype, device=device)
        low, high = _seen(node, ranges)
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device, leaf.dtype)

    leaves, nodes = signature_of(program).leaves, program.graph_signature.user_inputs
    return [made(leaf, str(node), usual) for leaf, node, (_, usual, _) in zip(leaves, nodes, shapes, strict=True)]


def _seen(name: str, ranges: RangeTable | None) -> tuple[float, float]:
    """The least and the largest value of the input whose node this is."""
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
        pairs = _pairs(pytree.tree_leaves(run(*args, **kwargs)), wanted)
        # Read here: what went wrong on a GPU is told to who asks it next.
        wrong = sum(int((~torch.isfinite(ours) & torch.isfinite(theirs)).sum()) for ours, theirs in pairs)
    except torch.OutOfMemoryError as error:  # for which the copy of the program may be to blame
        _log.warning("the engine was not tried out, for want of memory: %s", error)
        return None
    except Exception as error:  # the runtime's own, whatever it is
        return f"the engine does not run: {type(error).__name__}: {error}"
    total = sum(theirs.numel() for _, theirs in pairs)
    return f"the engine gives NaN or Inf for {wrong} of {total} values that its program gives" if wrong else None


def _pairs(given: Sequence[Any], wanted: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (ours, theirs)
        for ours, theirs in zip(given, wanted, strict=True)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and theirs.is_floating_point()
    ]
