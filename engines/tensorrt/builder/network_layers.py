"""Which node each layer of a TensorRT network comes from: names that lowering carries along, and what was seen.

Nothing here imports TensorRT.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from calibcast.calib.graph import walk
from calibcast.engines.tensorrt.builder.job import Profile
from torch.export import ExportedProgram

# The fx metadata that torch.export copies to the nodes that a node decomposes to, and our key in it.
_CUSTOM, _KEY = "custom", "calibcast"


@dataclass(frozen=True)
class NetworkLayer:
    """One layer of a TensorRT network before fusion. engine: the index of the network. node: the node that made the
    layer."""

    engine: int
    name: str
    kind: str
    node: str
    outputs: tuple[str, ...]
    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Conversion:
    """What was seen while networks were made; it grows during a build.

    profiles: for each network, input name -> the profile that TensorRT was given. outputs: for each network, the index
    among the engine's outputs of each value that the network gives in the graph.
    """

    layers: list[NetworkLayer] = field(default_factory=list)
    networks: int = 0
    profiles: list[dict[str, Profile]] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """As plain data, for JSON."""
        return [asdict(layer) for layer in self.layers]


def stamp(program: ExportedProgram) -> None:
    """Give every node its own name as metadata, for lowering to carry along. Changes `program`'s metadata.

    Placeholders get none: when torch lowers, it looks a placeholder up by its name, and would find another node of that
    name.
    """
    for step in walk(program.graph_module):
        if step.node.op == "placeholder":
            continue
        step.node.meta[_CUSTOM] = {**(step.node.meta.get(_CUSTOM) or {}), _KEY: step.name}


def stamped_name(node: torch.fx.Node) -> str:
    """The name that `stamp` gave to the node that this one comes from; "" when lowering lost it."""
    return str((node.meta.get(_CUSTOM) or {}).get(_KEY, ""))


def layer_metadata(node: str) -> str:
    """The metadata of a layer that `node` made. TensorRT joins the metadata of layers that it fuses; the brackets keep
    names apart, since `calib`'s names contain none."""
    return f"[node:{node}]"


def described(layer: Any, engine: int, node: str) -> NetworkLayer:
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    outputs = [output for output in outputs if output is not None]
    return NetworkLayer(
        engine=engine,
        name=layer.name,
        kind=str(layer.type).removeprefix("LayerType."),
        node=node,
        outputs=tuple(output.name for output in outputs),
        types=tuple(str(output.dtype).removeprefix("DataType.") for output in outputs),
        shapes=tuple(_shape(output) for output in outputs),
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in tensor.shape)
    except ValueError:  # its rank is unknown while the network is being made
        return ()
