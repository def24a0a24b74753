"""Programs that were exported in training mode: dropout drops, and norms learn."""

from __future__ import annotations

from typing import Any

import torch
from calibcast.calib.errors import ProgramError
from calibcast.calib.graph import where
from torch import fx
from torch.export import ExportedProgram


def refuse_training(program: ExportedProgram) -> None:
    """Raise ProgramError for a model that was exported in train mode: its ranges would be those of training.

    Dropout that drops, and norms that update running statistics.
    """
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if _trains(node):
                    raise ProgramError(
                        f"{where(node)}: {node.target} runs in training mode, so every call would give another "
                        "result. Call model.eval() before torch.export.export(model, ...)."
                    )


# op -> position of its `training` flag, and of the running statistics without which training is the only mode.
_TRAINING_FLAG = {
    "aten::dropout": (2, None),
    "aten::dropout_": (2, None),
    "aten::feature_dropout": (2, None),
    "aten::alpha_dropout": (2, None),
    "aten::feature_alpha_dropout": (2, None),
    "aten::native_dropout": (2, None),
    "aten::rrelu": (3, None),
    "aten::batch_norm": (5, 3),
    "aten::instance_norm": (5, 3),
    "aten::_native_batch_norm_legit": (5, 3),
    "aten::native_batch_norm": (5, 3),
}


def _trains(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(arguments)
    ]
    entry = _TRAINING_FLAG.get(node.target._schema.name)
    if entry is None:
        return _drops_inside({argument.name: value for argument, value in zip(arguments, values, strict=True)})
    flag, statistics = entry
    drops = statistics is not None or "dropout" not in node.target._schema.name or values[1] != 0
    return bool(values[flag] is True and drops and (statistics is None or values[statistics] is not None))


def _drops_inside(given: dict[str, Any]) -> bool:
    """Whether an op with these arguments drops on the way: attention its weights, lstm and gru between layers."""
    if given.get("dropout_p"):
        return True
    return given.get("train") is True and bool(given.get("dropout")) and given.get("num_layers") != 1
