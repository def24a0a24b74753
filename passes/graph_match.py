"""Which node of a cast graph stands for which node of its program, and whether the one was made from the other."""

from __future__ import annotations

from operator import getitem

from calibcast.calib.batches import signature_of
from calibcast.calib.errors import MismatchError
from calibcast.calib.flattening import inlined_name
from calibcast.calib.graph import REGION_CHILD, op_name, tensor_values, walk, where
from calibcast.passes.cast_insertion import CAST, CLAMP
from torch import fx
from torch.export import ExportedProgram


def check_match(program: ExportedProgram, mixed: ExportedProgram) -> None:
    """Raise MismatchError unless `mixed` has the nodes of `program`, in their order, and otherwise only casts."""
    theirs, ours = _tensor_nodes(program), _tensor_nodes(mixed)
    problem = _difference(theirs, ours) or _signature_difference(program, mixed)
    if problem is not None:
        raise MismatchError(
            f"the cast graph was not made from this program: {problem}. Compare a program with what insert_casts makes "
            "of it."
        )


def _tensor_nodes(program: ExportedProgram) -> dict[str, fx.Node]:
    """The nodes that make tensors, by their inlined names, in order; not those that only pass tensors on."""
    return {
        inlined_name(step.name): step.node
        for step in walk(program.graph_module)
        if step.node.op == "call_function" or (step.node.op == "placeholder" and not step.inside)
        if step.node.target is not getitem and step.node.target not in REGION_CHILD and tensor_values(step.node)
    }


def _difference(theirs: dict[str, fx.Node], ours: dict[str, fx.Node]) -> str | None:
    for key, node in theirs.items():
        if key not in ours:
            return f"it lacks {where(node)}"
        if node.target != ours[key].target and node.op == "call_function":
            return f"{where(node)} is {op_name(node.target)} in the program and {op_name(ours[key].target)} in it"
    for key, node in ours.items():
        if key not in theirs and node.target not in {CAST, CLAMP}:
            return f"the program lacks its {where(node)}"
    if [key for key in ours if key in theirs] != list(theirs):
        return "its nodes have another order"
    return None


def _signature_difference(program: ExportedProgram, mixed: ExportedProgram) -> str | None:
    theirs, ours = signature_of(program).leaves, signature_of(mixed).leaves
    if len(theirs) != len(ours):
        return f"it takes {len(ours)} inputs, the program {len(theirs)}"
    for leaf, other in zip(theirs, ours, strict=True):
        if (leaf.dtype, len(leaf.sizes)) != (other.dtype, len(other.sizes)):
            return f"input {leaf.name} is {leaf} in the program and {other} in it"
    return None
