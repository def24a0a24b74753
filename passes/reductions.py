"""How many terms an operator sums into one element, and how large its hidden values can get by that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from calibcast.calib import operators
from calibcast.calib.graph import as_list, is_transposed, size_hint
from calibcast.calib.hidden import group_count, is_pool, reduced_dimensions, window_size
from torch import fx

_ALONG_DIMENSIONS = operators.SUMS | operators.SQUARES | operators.EXPONENTIALS
_CONVOLVES = operators.CONVOLUTIONS | operators.TRANSPOSED
_SUM_UP = _ALONG_DIMENSIONS | _CONVOLVES | operators.PRODUCTS_OF_MATRICES | operators.RECURRENT | operators.ATTENTION


def depth_of_reduction(node: fx.Node, base: str) -> int | None:
    """Terms per output element; None for an operator that sums nothing. Symbolic sizes count as at export."""
    if base not in _SUM_UP:
        return None
    shapes = _shapes(node)
    if not shapes:
        return None
    if base in _ALONG_DIMENSIONS:
        return _reduced(node, base, shapes[0])
    if base in operators.RECURRENT:
        return _recurrent_depth(node)
    return _depth_of_product(node, base, shapes)


def _depth_of_product(node: fx.Node, base: str, shapes: list[list[int]]) -> int | None:
    if base in operators.PRODUCTS_OF_MATRICES:
        place = operators.operator_of(base).left
        left = shapes[place] if len(shapes) > place else shapes[0]
        right = shapes[place + 1] if len(shapes) > place + 1 else []
        # Two batches of matrices that give one matrix: the products of the batch are summed up, too.
        batch = left[0] if len(left) == len(right) == 3 and node.meta["val"].dim() == 2 else 1
        return batch * left[-1] if left else 1
    if len(shapes) > 1 and base in _CONVOLVES:
        return _convolution_depth(node, base, shapes[1])
    if len(shapes) > 1 and base in operators.ATTENTION:
        return max(shapes[1][-2], shapes[0][-1])  # keys, summed over by the values; features, by the logits
    return None


def hidden_values(
    node: fx.Node, base: str, depth: int, magnitudes: Sequence[float], measured: float | None
) -> list[tuple[str, float]]:
    """The hidden values of an operator that sums `depth` terms, and how large they get: `measured` by calibration, or
    else bounded by the peaks of its inputs. NaN where a peak is unknown.

    sum of n terms: n max|x|. Sum of squares: n max|x|^2. Softmax, after subtracting the maximum: n exponentials of
    at most 1. Attention: logits before scaling, d max|q| max|k|.
    """
    if not magnitudes:
        return []
    peak = magnitudes[0]
    if base in operators.SUMS:
        return [("sum", depth * peak if measured is None else measured)]
    if base in operators.SQUARES:
        return [("sum of squares", depth * peak * peak if measured is None else measured)]
    if base in operators.EXPONENTIALS:
        return [("sum of exponentials", float(depth))]
    if base in operators.ATTENTION and len(magnitudes) > 1:
        shapes = _shapes(node)
        logits = shapes[0][-1] * peak * magnitudes[1] if measured is None else measured
        return [("attention logits", logits), ("sum of exponentials", float(shapes[1][-2]))]
    return []


def _convolution_depth(node: fx.Node, base: str, weight: list[int]) -> int:
    transposed = is_transposed(node)
    # A weight is [out, in / groups, *kernel]; that of a transposed convolution is [in, out / groups, *kernel].
    if transposed:
        groups = next((a for a in reversed(node.args) if isinstance(a, int) and not isinstance(a, bool)), 1)
        return max(1, weight[0] // max(1, groups)) * math.prod(weight[2:])
    return math.prod(weight[1:])


def _recurrent_depth(node: fx.Node) -> int:
    weights = [
        [size_hint(size) for size in value.shape]
        for value in (argument.meta.get("val") for argument in node.all_input_nodes)
        if isinstance(value, torch.Tensor) and value.dim() == 2
    ]
    return max((shape[-1] for shape in weights), default=1)


def _reduced(node: fx.Node, base: str, shape: list[int]) -> int:
    if is_pool(base):
        return window_size(base, [_at_export(size) for size in as_list(node.args[1])], shape)
    groups = group_count(node, base)
    if groups is not None:
        return math.prod(shape[1:]) // max(1, groups)
    return math.prod(shape[d] for d in reduced_dimensions(node, base, len(shape)))


def _at_export(size: Any) -> int:
    return size_hint(size.meta["val"] if isinstance(size, fx.Node) else size)


def _shapes(node: fx.Node) -> list[list[int]]:
    """The shapes of the tensor arguments, in order of the arguments."""
    values = [argument.meta.get("val") for argument in node.args if isinstance(argument, fx.Node)]
    return [[size_hint(size) for size in value.shape] for value in values if isinstance(value, torch.Tensor)]
