"""By which power of two the sums inside an operator shrink, when its inputs are stored as 2^-k times their values."""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem

from calibcast.calib.graph import base_op, walk
from calibcast.calib.operators import ATTENTION, SQUARES, SUMS
from torch import fx
from torch.export import ExportedProgram


def hidden_exponents(program: ExportedProgram, exponents: Mapping[tuple[str, int], int]) -> dict[str, tuple[int, int]]:
    """By node: k of its largest sum (`hidden_max`) and k of its least mean square (`hidden_min`), unless both are 0.

    program: the rescaled program. exponents: k of its tensors, by node and output.
    """
    found: dict[str, tuple[int, int]] = {}
    for step in walk(program.graph_module):
        if step.node.op != "call_function" or step.inside:
            continue
        base = base_op(step.node.target)
        if base not in SUMS | SQUARES | ATTENTION:
            continue
        k = [_exponent(n, exponents) for n in step.node.args if isinstance(n, fx.Node)]
        if not any(k[:2]):
            continue
        if base in ATTENTION:
            found[step.name] = (k[0] + k[1], 0)
        else:
            found[step.name] = (2 * k[0], 2 * k[0]) if base in SQUARES else (k[0], 0)
    return {name: pair for name, pair in found.items() if any(pair)}


def _exponent(node: fx.Node, exponents: Mapping[tuple[str, int], int]) -> int:
    if node.target is getitem:
        maker, output = node.args
        assert isinstance(maker, fx.Node)
        assert isinstance(output, int)
        return exponents.get((maker.name, output), 0)
    return exponents.get((node.name, 0), 0)
