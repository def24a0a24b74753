"""Recognise programs that were exported in training mode: dropout is active, and norms update their statistics."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.errors import ProgramError
from calibcast.calib.graph import base_op, where
from calibcast.calib.operators import operator_of
from torch import fx
from torch.export import ExportedProgram


def refuse_training(program: ExportedProgram) -> None:
    """Raise ProgramError for a model that was exported in train mode: its ranges would be those of training.

    That is: dropout drops, or a norm updates its running statistics.
    """
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if _trains(node):
                    raise ProgramError(
                        f"{where(node)}: {node.target} runs in training mode, so every call would give another "
                        "result. Call model.eval() before torch.export.export(model, ...)."
                    )


def _trains(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = _given(node)
    training = operator_of(base_op(node.target)).training
    if training is None:
        return _drops_inside(given)
    values = list(given.values())
    drops = training.share is None or values[training.share] != 0
    normalises = training.statistics is None or values[training.statistics] is not None
    return bool(values[training.flag] is True and drops and normalises)


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers when it runs: not dropout in evaluation, nor attention that drops nothing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not is_random(node.target):
        return False
    if operator_of(base_op(node.target)).training is not None:
        return _trains(node)
    given = _given(node)
    return _drops_inside(given) if given.keys() & {"dropout_p", "dropout"} else True


def is_random(target: Any) -> bool:
    """Whether an operator may draw random numbers: by torch's tag, which the dropout of whole channels lacks."""
    training = operator_of(base_op(target)).training
    if training is not None:
        return training.statistics is None
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call, by name."""
    return {
        argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    }


def _drops_inside(given: dict[str, Any]) -> bool:
    """Whether an op applies dropout inside: attention to its weights, lstm and gru between layers."""
    if given.get("dropout_p"):
        return True
    return given.get("train") is True and bool(given.get("dropout")) and given.get("num_layers") != 1
