"""Which weights are stored in the low type: those that only low nodes read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from calib.aliasing import mutated_inputs
from calib.graph import input_targets, state_tensor, tensor_values
from passes.node_types import NodeTypes

# Elements converted at a time when looking for values that the low type does not hold.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class LowWeights:
    """The state of the rewritten program. placeholders: names of the inputs that it stores in the low type."""

    placeholders: frozenset[str]
    state_dict: dict[str, Any]
    constants: dict[str, Any]


def low_weights(
    program: ExportedProgram, source: fx.GraphModule, types: NodeTypes, masks: Collection[fx.Node] = ()
) -> LowWeights:
    """Convert, one at a time, the fp32 weights that all readers take in the low type; share the others.

    A weight stays as it is when it is written to, given out or passed to a region, when it shares storage with one
    that stays, or when a finite value of it would become inf; those in `masks` are saturated. Buffers that a call
    writes into are copied, so that running the result leaves the caller's program alone.
    """
    targets = input_targets(program)
    mutated = mutated_inputs(program)
    holders = {n.name: n for n in source.graph.nodes if n.op == "placeholder" and n.name in targets}
    wanted = {name for name, node in holders.items() if name not in mutated and _only_low(node, types)}
    stays = {_storage(program, targets[name]) for name in holders if name not in wanted}
    # Export gives all readers of tied weights one of the names, so the others are read by nobody.
    read = {_storage(program, targets[name]) for name in wanted if holders[name].users} - stays
    state, constants = dict(program.state_dict), dict(program.constants)
    converted: dict[tuple[Any, ...], torch.Tensor] = {}
    stored = set()
    for name in sorted(wanted):
        tensor = state_tensor(program, targets[name])
        if tensor is None or _storage(program, targets[name]) not in read:
            continue
        key = (*_key(tensor), holders[name] in masks)
        if holders[name] in masks:
            tensor = tensor.detach().clamp(min=saturation(types.low_type))
        if not _fits(tensor, types.low_type):
            continue
        if key not in converted:  # tied weights stay tied
            converted[key] = _converted(tensor, types.low_type)
        home = state if targets[name] in program.state_dict else constants
        home[targets[name]] = converted[key]
        stored.add(name)
    for target, copied in _written_state(program, targets, mutated).items():
        (state if target in program.state_dict else constants)[target] = copied
    return LowWeights(frozenset(stored), state, constants)


def saturation(low_type: torch.dtype) -> float:
    """What mask values below it become in the low type: half the least finite value.

    exp(-32752) is 0 for any scores, and adding scores of thousands to it still gives a finite value.
    """
    return float(torch.finfo(low_type).min) / 2


def _only_low(node: fx.Node, types: NodeTypes) -> bool:
    is_float = [value.dtype == torch.float32 for _, value in tensor_values(node)]
    return is_float == [True] and all(user in types.low for user in node.users)


def _written_state(program: ExportedProgram, targets: dict[str, str], mutated: set[str]) -> dict[str, torch.Tensor]:
    """Copies of the buffers that a call writes into; tied ones stay tied, overlapping views stay shared."""
    written = {_storage(program, targets[name]) for name in mutated if name in targets}
    held = {target: t for target in targets.values() if (t := state_tensor(program, target)) is not None}
    keys = {target: _key(t) for target, t in held.items() if _storage(program, target) in written}
    views = Counter(key[0] for key in set(keys.values()))
    copies = {key: _converted(held[target], held[target].dtype) for target, key in keys.items()}
    return {target: copies[key] for target, key in keys.items() if views[key[0]] == 1}


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same for tensors that are the same elements of one storage."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _storage(program: ExportedProgram, target: str) -> int:
    tensor = state_tensor(program, target)
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()


def _fits(tensor: torch.Tensor, low_type: torch.dtype) -> bool:
    """Whether no finite value becomes inf: then the cast is left to run time, where `init_max` governs it."""
    for piece in torch.split(tensor.detach().reshape(-1), _CHUNK):
        if not torch.equal(torch.isfinite(piece.to(low_type)), torch.isfinite(piece)):
            return False
    return True


def _converted(tensor: torch.Tensor, low_type: torch.dtype) -> torch.Tensor:
    low = tensor.detach().to(low_type, copy=True)
    return torch.nn.Parameter(low, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else low
