"""What the statistics of a batch norm say about its channels: how large the mean is beside the deviation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from calibcast.calib.graph import argument_at, base_op, input_targets, state_tensor
from calibcast.calib.operators import operator_of
from torch import fx
from torch.export import ExportedProgram


def channels_of(program: ExportedProgram) -> Callable[[fx.Node], float | None]:
    """For a batch norm node: the largest ratio of squared mean to variance of a channel; None where it is not known."""
    targets = input_targets(program)

    def held(node: fx.Node, position: int) -> torch.Tensor | None:
        argument = argument_at(node, position)
        name = argument.name if isinstance(argument, fx.Node) else None
        found = state_tensor(program, targets[name]) if name in targets else None
        return None if found is None or found.is_meta else found.detach().double()

    @cache
    def ratio(node: fx.Node) -> float | None:
        place = operator_of(base_op(node.target)).variance_at
        if place is None:
            return None
        mean, variance = held(node, place - 1), held(node, place)
        if mean is None or variance is None or not variance.numel():
            return None
        return float((mean.square() / variance.clamp(min=1e-30)).amax())

    return ratio
