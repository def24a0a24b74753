"""Tensors without values: the outputs of `empty`, and views of them that are only written to.

Their elements are what the memory held before: other numbers in every run, and at times NaN. They say nothing about
ranges or the error of a cast. So calibration counts them as zeros, and a comparison leaves them out.
"""

from __future__ import annotations

from calibcast.calib.aliasing import shared_arguments, written_arguments
from calibcast.calib.graph import base_op, walk
from calibcast.calib.operators import EMPTIES, OVERWRITES
from torch import fx
from torch.export import ExportedProgram


def undefined_tensors(program: ExportedProgram) -> frozenset[str]:
    """Qualified names of the nodes whose output holds no values when they have run.

    A view of empty memory counts when its only users write over all of it, or are further such views. A view that is
    read in another way may come after a write, and then has the values written.
    """
    steps = list(walk(program.graph_module))
    targets: set[fx.Node] = set()
    for step in reversed(steps):
        users = step.node.users
        if users and all(_writes_over(user, step.node) or (_is_view(user) and user in targets) for user in users):
            targets.add(step.node)
    found: dict[fx.Node, str] = {}
    for step in steps:
        node = step.node
        makes = node.op == "call_function" and base_op(node.target) in EMPTIES
        if makes or (node in targets and _is_view(node) and all(n in found for n in shared_arguments(node))):
            found[node] = step.name
    return frozenset(found.values())


def _writes_over(writer: fx.Node, target: fx.Node) -> bool:
    reads_once = writer.op == "call_function" and list(writer.args).count(target) == 1
    return reads_once and base_op(writer.target) in OVERWRITES and written_arguments(writer) == [target]


def _is_view(node: fx.Node) -> bool:
    return bool(shared_arguments(node)) and not written_arguments(node)
