"""Whose storage an output may live in, and which inputs a program writes into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.aliasing import mutated_inputs, storage_roots, written_placeholders
from torch import fx, nn
from torch.export import ExportedProgram

from tests.functions import exported


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_work(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x, 0.5, training=False)


# Ways to the storage of a square matrix: what they give may be written to, and the matrix then changes.
ALIASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(9),
    "reshape": lambda x: x.reshape(9),
    "flatten": torch.flatten,
    "transpose": lambda x: x.t(),
    "movedim": lambda x: x.movedim(0, 1),
    "select": lambda x: x[1],
    "slice": lambda x: x[:, ::2],
    "diagonal": lambda x: x.diagonal(),
    "split": lambda x: x.split(1)[2],
    "unbind": lambda x: x.unbind(1)[0],
    "chunk of a transpose": lambda x: x.t().chunk(3)[1],
    "contiguous": lambda x: x.contiguous(),
    "to its own type": lambda x: x.float(),
    "detach": lambda x: x.detach(),
    "idle dropout": without_work,
    "idle alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.5, training=False),
    "expand as itself": lambda x: x.expand_as(x),
    "real": lambda x: x.real,
    "type_as": lambda x: x.type_as(torch.ones(2)),
    "atleast_2d": torch.atleast_2d,
    "atleast_1d of several": lambda x: torch.atleast_1d([x, x[0]])[0],
    "broadcast": lambda x: torch.broadcast_tensors(x, torch.ones(3, 3))[0],
    "meshgrid": lambda x: torch.meshgrid(x[0], indexing="ij")[0],
    "einsum of one": lambda x: torch.einsum("ij->ji", x),
    "cartesian product of one": lambda x: torch.cartesian_prod(x[0]),
    "unsafe chunk": lambda x: torch.unsafe_chunk(x, 3)[0],
    "unsafe split": lambda x: torch.unsafe_split(x, 1)[1],
    "sum to its own size": lambda x: x.sum_to_size(3, 3),
    "conj_physical": lambda x: torch.conj_physical(x),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_write_through_an_alias_is_a_write_to_the_input(alias: str) -> None:
    """However storage is reached, writing to it is found, and the user's tensor keeps its bits."""
    program = exported(lambda x: ALIASES[alias](x).mul_(3) + 1, noise(3, 3))
    x = noise(3, 3, seed=1)
    written = ALIASES[alias](x.clone()).untyped_storage().nbytes() == x.untyped_storage().nbytes()
    calibrate(program, [x], progress=False)
    assert written
    assert mutated_inputs(program) == {"args_0"}
    assert torch.equal(x, noise(3, 3, seed=1))


COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda x: x + 1,
    "clone": lambda x: x.clone(),
    "cat": lambda x: torch.cat([x]),
    "stack": lambda x: torch.stack([x, x]),
    "index": lambda x: x[torch.tensor([0, 1])],
    "product of two by einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "matmul": lambda x: x @ x,
}


@pytest.mark.parametrize("copy", COPIES)
def test_write_to_a_copy_is_no_write_to_the_input(copy: str) -> None:
    """A new tensor that an op has made may be written to without the input being counted as written."""
    program = exported(lambda x: COPIES[copy](x).mul_(3) + 1, noise(3, 3))
    assert mutated_inputs(program) == set()


def test_reading_writes_nothing() -> None:
    """A program without in-place ops changes no input, though views abound."""
    assert mutated_inputs(exported(lambda x: x.t().reshape(9).unsqueeze(0) * 2, noise(3, 3))) == set()


def test_dropping_gradient_history_writes_nothing() -> None:
    """`detach_` is in place by its name and schema, and changes no value."""
    program = exported(lambda x: x.detach_() * 2, noise(3, 3))
    assert any(node.target == torch.ops.aten.detach_.default for node in program.graph.nodes)
    assert mutated_inputs(program) == set()


class Writer(nn.Module):
    """Writes to a buffer, to a slice of another, to one input; reads the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("memory", torch.zeros(4, 3), persistent=False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        self.memory[1:3].select(0, 0).copy_(x)
        return y.relu_() * self.scale * self.weight


@pytest.fixture(scope="module")
def writer() -> ExportedProgram:
    return torch.export.export(Writer(), (noise(3), noise(3)))


def test_only_what_is_written_counts_as_mutated(writer: ExportedProgram) -> None:
    """Buffers and inputs that are written to are found; parameters, other buffers and inputs are not."""
    assert mutated_inputs(writer) == {"b_count", "b_memory", "y"}


def test_functional_graphs_tell_their_mutations(writer: ExportedProgram) -> None:
    """After decomposition the writes are outputs, and mean the same inputs."""
    assert mutated_inputs(writer.run_decompositions()) == {"b_count", "b_memory", "y"}


class Region(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = y.view(-1).mul_(2)
        return x + z


def test_writes_inside_a_region_are_writes_to_its_operands() -> None:
    """A region that writes to what is passed to it writes to the input outside."""
    program = torch.export.export(Region(), (noise(3), noise(3)))
    x, y = noise(3, seed=1), noise(3, seed=2)
    calibrate(program, [(x, y)], progress=False)
    assert written_placeholders(program.graph_module) == ["y"]
    assert torch.equal(y, noise(3, seed=2))


def test_roots_are_the_makers_of_storage() -> None:
    """Through any chain of views, a root is the node that made the storage; new results are their own."""
    graph_module = exported(lambda x: (x.t()[0].view(3), (x + 1).relu_().view(9)), noise(3, 3)).graph_module
    roots = {node.name: {root.name for root in found} for node, found in storage_roots(graph_module).items()}
    assert roots["view"] == roots["select"] == roots["t"] == {"args_0"}
    assert roots["view_1"] == roots["relu_"] == roots["add"] == {"add"}


def test_roots_name_every_possible_maker() -> None:
    """Where an op may give back several of its arguments, all of them are roots."""
    program = exported(lambda x, y: torch.broadcast_tensors(x, y)[1] * 2, noise(3, 3), noise(3, 3))
    broadcast = next(node for node in program.graph.nodes if "broadcast" in str(node.target))
    roots = storage_roots(program.graph_module)
    assert {root.name for root in roots[broadcast]} == {"args_0", "args_1"}
    assert all(isinstance(root, fx.Node) for root in roots[broadcast])
