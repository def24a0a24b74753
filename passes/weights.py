"""Which weights are stored in the low type: those that only low nodes read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from calibcast.calib.aliasing import mutated_inputs
from calibcast.calib.graph import input_targets, state_tensor, tensor_values
from calibcast.calib.masks import mask_nodes, mask_sources
from calibcast.calib.plain_tensors import storage_of
from calibcast.calib.rounding import saturation as saturation
from calibcast.calib.state_copies import copies_of_written
from calibcast.passes.node_types import NodeTypes
from calibcast.passes.regions import qualified_name
from torch import fx
from torch.export import ExportedProgram

# Elements converted at a time when looking for values that the low type does not hold.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class LowWeights:
    """The state of the rewritten program. placeholders: names of the inputs that it stores in the low type."""

    placeholders: frozenset[str]
    state_dict: dict[str, Any]
    constants: dict[str, Any]


@dataclass(frozen=True)
class WeightReaders:
    """Which weights may be stored low, and who reads them. No plan changes this.

    targets: for each placeholder that holds a weight, its name in the state. readers: the readers of each in the flat
    graph; None where it must stay, as it is not fp32 or is written to. storage: the memory address of each, which is
    equal for tied weights. masks: names of the placeholders that are saturated.
    """

    program: ExportedProgram = field(repr=False)
    targets: dict[str, str]
    mutated: set[str]
    readers: dict[str, frozenset[fx.Node] | None]
    storage: dict[str, int]
    masks: frozenset[str] = frozenset()

    @classmethod
    def of(cls, program: ExportedProgram, source: fx.GraphModule, masks: Collection[fx.Node] = ()) -> WeightReaders:
        """`source`: the program's flat graph; `masks`: its nodes that hold mask values."""
        targets, mutated = input_targets(program), mutated_inputs(program)
        holders = {n.name: n for n in source.graph.nodes if n.op == "placeholder" and n.name in targets}
        readers = {
            name: frozenset(node.users) if name not in mutated and _is_fp32(node) else None
            for name, node in holders.items()
        }
        storage = {name: _storage(program, targets[name]) for name in holders}
        return cls(program, targets, mutated, readers, storage, frozenset(node.name for node in masks))

    def stored_low(self, low: frozenset[fx.Node], fits: Callable[[str], bool]) -> list[str]:
        """Names of the placeholders whose weights only nodes in `low` read, and which fit.

        A weight stays as it is when it is written to, returned or passed to a region, when it shares storage with
        one that stays, or when `fits(name)` says no: a finite value of it would become inf.
        """
        wanted = {name for name, readers in self.readers.items() if readers is not None and readers <= low}
        stays = {self.storage[name] for name in self.readers if name not in wanted}
        # Export makes all readers of tied weights read the same placeholder, so nobody reads the others.
        read = {self.storage[name] for name in wanted if self.readers[name]} - stays
        return [name for name in sorted(wanted) if self.storage[name] in read and fits(name)]

    def fits(self, name: str, low_type: torch.dtype) -> bool:
        """Whether it is a tensor whose finite values (masks saturated) all stay finite in the low type."""
        tensor = self.value(name, low_type)
        return tensor is not None and _fits(tensor, low_type)

    def value(self, name: str, low_type: torch.dtype) -> torch.Tensor | None:
        """The weight or saturated mask to convert; None where it is no tensor."""
        tensor = state_tensor(self.program, self.targets[name])
        if tensor is None or name not in self.masks:
            return tensor
        return tensor.detach().clamp(min=saturation(low_type))


def low_weights(
    program: ExportedProgram, source: fx.GraphModule, types: NodeTypes, masks: Collection[fx.Node] = ()
) -> LowWeights:
    """Convert, one at a time, the fp32 weights that all readers take in the low type; share the others.

    Those in `masks` are saturated. Buffers that a call writes into are copied, so that running the result leaves the
    caller's program alone.
    """
    readers = WeightReaders.of(program, source, masks)
    targets = readers.targets
    state, constants = dict(program.state_dict), dict(program.constants)
    converted: dict[tuple[Any, ...], torch.Tensor] = {}
    stored = readers.stored_low(types.low, lambda name: readers.fits(name, types.low_type))
    for name in stored:
        tensor = state_tensor(program, targets[name])
        assert tensor is not None
        key = (*_key(tensor), name in readers.masks)
        if key not in converted:  # tied weights stay tied
            tensor = readers.value(name, types.low_type)
            assert tensor is not None
            converted[key] = _converted(tensor, types.low_type)
        home = state if targets[name] in program.state_dict else constants
        home[targets[name]] = converted[key]
    for target, copied in _written_state(program, targets, readers.mutated).items():
        (state if target in program.state_dict else constants)[target] = copied
    return LowWeights(frozenset(stored), state, constants)


def masks_to_saturate(program: ExportedProgram, source: fx.GraphModule, seen: Collection[str] | None) -> set[fx.Node]:
    """The nodes in which calibration has `seen` mask values; without ranges, those masked by a number in the graph."""
    if seen is None:
        return mask_nodes(source, set())
    names = set(seen)
    if not names:
        return set()
    return {node for node in mask_nodes(source, mask_sources(program)) if qualified_name(node) in names}


def _is_fp32(node: fx.Node) -> bool:
    return [value.dtype == torch.float32 for _, value in tensor_values(node)] == [True]


def _written_state(program: ExportedProgram, targets: dict[str, str], mutated: set[str]) -> dict[str, torch.Tensor]:
    """Copies of the buffers that a call writes into; tied ones stay tied, overlapping ones overlap."""
    held = {target: t for target in targets.values() if (t := state_tensor(program, target)) is not None}
    copies = copies_of_written(held, {targets[name] for name in mutated if name in targets})
    return {target: _like(held[target], copy) for target, copy in copies.items()}


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of one storage."""
    return storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _storage(program: ExportedProgram, target: str) -> int:
    tensor = state_tensor(program, target)
    return 0 if tensor is None else storage_of(tensor)


def _fits(tensor: torch.Tensor, low_type: torch.dtype) -> bool:
    """Whether no finite value becomes inf. If one does, the cast is left to run time, where `init_max` governs it."""
    most = torch.finfo(low_type).max
    if tensor.numel() == 0:
        return True
    for piece in (tensor.detach(),) if tensor.numel() <= _CHUNK else torch.split(tensor.detach().reshape(-1), _CHUNK):
        low, high = torch.aminmax(piece)
        if -most <= low.item() and high.item() <= most:
            continue
        # Close to the largest value, rounding decides; and NaN or Inf in the piece hide the other values.
        if not torch.equal(torch.isfinite(piece.to(low_type)), torch.isfinite(piece)):
            return False
    return True


def _converted(tensor: torch.Tensor, low_type: torch.dtype) -> torch.Tensor:
    return _like(tensor, tensor.detach().to(low_type, copy=True))


def _like(tensor: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    # `requires_grad` changes how some operators decompose (embedding_bag), and so whether a builder accepts them.
    return torch.nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copy
