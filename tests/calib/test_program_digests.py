"""Knowing a program again: what changes a fingerprint, what does not, and which node is named."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib.graph_digests import fingerprint, first_difference
from calibcast.calib.program_digests import inputs_hash, node_digests, weights_hash
from torch import nn
from torch.export import Dim, ExportedProgram

from tests.functions import exported

ROOT = Path(__file__).parents[2]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A convolution with symbolic sizes, a norm, nested autocast and no_grad regions, a literal."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(6, eps=eps)
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).transpose(1, 2)) * self.scale
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(y)
            with torch.autocast("cpu", enabled=False):
                y = self.linear(y.float()) + torch.tensor([1.0])
        with torch.no_grad():
            y = y.relu()
        return torch.cat([y, y * 2], 1)


def block(eps: float = 1e-5) -> ExportedProgram:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", min=2, max=16), 2: Dim("length", min=3, max=64)},)
    return torch.export.export(Block(eps).eval(), (noise(2, 4, 10),), dynamic_shapes=shapes)


class Branches(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * self.factor, lambda x: x - 1, (x,)) + 0.5


def difference(one: ExportedProgram, other: ExportedProgram) -> str | None:
    return first_difference(node_digests(one), node_digests(other))


SCRIPT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("models", sys.argv[1])
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
program = models.block()
print(json.dumps([models.node_digests(program), models.weights_hash(program)]))
"""


def test_two_processes_find_the_same_digests() -> None:
    """Exported here and in another process, a model has one fingerprint and one hash of its weights."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__],
        env={**os.environ, "PYTHONPATH": str(ROOT / ".package"), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    digests, weights = json.loads(done.stdout.splitlines()[-1])
    assert digests == node_digests(block())
    assert weights == weights_hash(block())
    assert len(digests) > 15


def test_digests_do_not_depend_on_what_was_exported_before() -> None:
    """Other programs exported in between, and another example size, change nothing."""
    first = block()
    exported(lambda x: x + 1, noise(3))
    shapes = ({0: Dim("b", min=2, max=16), 2: Dim("n", min=3, max=64)},)
    again = torch.export.export(Block().eval(), (noise(5, 4, 21),), dynamic_shapes=shapes)
    assert difference(first, again) is None
    assert fingerprint(node_digests(first)) == fingerprint(node_digests(again))


@pytest.mark.parametrize("make", [block, lambda: torch.export.export(Branches(), (noise(3),))], ids=["regions", "cond"])
def test_saving_and_loading_keeps_the_fingerprint(make: Callable[[], ExportedProgram]) -> None:
    """A program out of a `.pt2` is the same program, with regions, branches and symbolic sizes too."""
    program = make()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert difference(program, loaded) is None
    assert fingerprint(node_digests(program)) == fingerprint(node_digests(loaded))
    assert weights_hash(program) == weights_hash(loaded)


X, Y = noise(3, 4), noise(3, 4, seed=1)


def base(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * 2 + y).softmax(-1)


Change = tuple[Callable[..., Any], tuple[torch.Tensor, torch.Tensor], str]
CHANGES: dict[str, Change] = {
    "op": (lambda x, y: (x * 2 - y).softmax(-1), (X, Y), "node add is only in this program"),
    "overload": (lambda x, y: (x * x + y).softmax(-1), (X, Y), "node mul has another"),
    "edge": (lambda x, y: (y * 2 + x).softmax(-1), (X, Y), "node mul has another"),
    "order of operands": (lambda x, y: (y + x * 2).softmax(-1), (X, Y), "node add has another"),
    "number": (lambda x, y: (x * 3 + y).softmax(-1), (X, Y), "node mul has another"),
    "attribute": (lambda x, y: (x * 2 + y).softmax(0), (X, Y), "node softmax has another"),
    "keyword": (lambda x, y: torch.add(x * 2, y, alpha=2).softmax(-1), (X, Y), "node add has another"),
    "dtype argument": (lambda x, y: (x * 2 + y).softmax(-1, torch.float64), (X, Y), "node softmax has another"),
    "shape": (base, (X[:2], Y[:2]), "node args_0 has another"),
    "dtype": (base, (X.double(), Y.double()), "node args_0 has another"),
    "one more": (lambda x, y: base(x, y).relu(), (X, Y), "node output has another"),
    "one fewer": (lambda x, y: x * 2 + y, (X, Y), "node softmax is only in this program"),
    "another output": (lambda x, y: (base(x, y), x)[1], (X, Y), "node output has another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_graph_is_another_fingerprint(change: str) -> None:
    """Another op, edge, argument, shape or dtype is another program, and the first node that differs is named."""
    function, args, message = CHANGES[change]
    program, other = exported(base, X, Y), exported(function, *args)
    assert fingerprint(node_digests(program)) != fingerprint(node_digests(other))
    assert str(difference(program, other)).startswith(message)


def test_same_graph_is_the_same_fingerprint() -> None:
    """The same function exported again is the same program."""
    again = exported(lambda a, b: (a * 2 + b).softmax(-1), X + 1, Y)
    assert difference(exported(base, X, Y), again) is None
    assert fingerprint(node_digests(exported(base, X, Y))) == fingerprint(node_digests(again))


def test_eps_of_a_norm_is_part_of_the_fingerprint() -> None:
    """LayerNorm with eps 1e-12 is not LayerNorm with eps 1e-5."""
    assert difference(block(1e-5), block(1e-12)) == "node layer_norm has another op, edge, argument, dtype or shape"


def test_body_of_a_branch_is_part_of_the_fingerprint() -> None:
    """Two programs that differ only inside a branch of `torch.cond` are two programs."""
    one, other = (torch.export.export(Branches(factor), (noise(3),)) for factor in (2.0, 3.0))
    assert str(difference(one, other)).startswith("node cond has another")


class InRegion(nn.Module):
    def __init__(self, factor: float, enabled: bool) -> None:
        super().__init__()
        self.factor, self.enabled = factor, enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return (x @ x) * self.factor


def test_body_and_type_of_a_region_are_part_of_the_fingerprint() -> None:
    """A change inside an autocast region is named by its qualified node; so is one of the region's own settings."""
    base, factor, enabled = (
        torch.export.export(InRegion(*settings), (noise(3, 3),))
        for settings in ((2.0, True), (3.0, True), (2.0, False))
    )
    assert str(difference(base, factor)).startswith("node submod_1.mul has another")
    assert difference(base, enabled) is not None


def test_symbolic_sizes_are_told_from_fixed_ones() -> None:
    """A dynamic dimension and a fixed one of the same example size are two programs."""
    fixed = torch.export.export(Block().eval(), (noise(2, 4, 10),))
    assert difference(block(), fixed) == "node x has another op, edge, argument, dtype or shape"


def zeros_beside(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros(3, dtype=torch.float64, device=x.device)


def test_device_is_no_part_of_the_fingerprint() -> None:
    """A program on another device, its factory ops too, is the same program."""
    assert difference(exported(zeros_beside, noise(3)), exported(zeros_beside, noise(3).to("meta"))) is None


def test_order_of_keywords_is_no_part_of_the_fingerprint() -> None:
    """The same keyword arguments written in another order, as loading may write them, are the same."""
    program = exported(zeros_beside, noise(3))
    digests = node_digests(program)
    longest = max(program.graph.nodes, key=lambda node: len(node.kwargs))
    longest.kwargs = dict(reversed(longest.kwargs.items()))
    assert len(longest.kwargs) > 1
    assert node_digests(program) == digests


def test_first_difference_reads_digests_in_order() -> None:
    """The first node of ours that differs is named, then one of theirs that we lack; order counts too."""
    digests = {"a": "1", "b": "2"}
    assert first_difference(digests, dict(digests)) is None
    assert first_difference(digests, {"a": "1"}) == "node b is only in this program"
    assert first_difference(digests, {**digests, "c": "3"}) == "node c is not in this program"
    assert str(first_difference(digests, {"a": "0", "b": "0"})).startswith("node a has another op")
    assert first_difference(digests, {"b": "2", "a": "1"}) == "the nodes stand in another order"
    assert fingerprint(digests) != fingerprint({"b": "2", "a": "1"})


@pytest.mark.parametrize("name", ["conv.weight", "norm.bias", "scale"])
def test_one_changed_weight_changes_the_hash_of_the_weights(name: str) -> None:
    """One element of one parameter or buffer is enough; the graph is the same."""
    program, other = block(), block()
    assert weights_hash(program) == weights_hash(other)
    with torch.no_grad():
        other.state_dict[name].view(-1)[-1] += 1e-3
    assert weights_hash(program) != weights_hash(other)
    assert difference(program, other) is None


def test_constants_count_as_weights() -> None:
    """A literal tensor is a weight: another value, another hash, the same graph."""
    one, other = (exported(lambda x, v=value: x + torch.tensor([v, 2.0]), noise(2)) for value in (1.0, 1.5))
    assert weights_hash(one) != weights_hash(other)
    assert difference(one, other) is None


def test_weights_hash_does_not_depend_on_strides() -> None:
    """The hash is of values in order, however they lie in memory; chunks do not matter."""
    one, other = block(), block()
    weight = other.state_dict["linear.weight"]
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert weights_hash(one) == weights_hash(other)


def test_weights_hash_is_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are hashed piece by piece; the size of a piece leaves no trace."""
    whole = weights_hash(block())
    monkeypatch.setattr("calibcast.calib.program_digests._CHUNK", 12)
    assert weights_hash(block()) == whole


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool, torch.int8]
)
def test_inputs_of_any_dtype_are_hashed(dtype: torch.dtype) -> None:
    """Equal inputs have equal hashes, others others, in every dtype."""
    x = (noise(3, 5) * 3).to(dtype)
    other = x.clone()
    other[1, 2] = other[1, 2].logical_not().to(dtype)
    assert inputs_hash([x, None, 3]) == inputs_hash([x.clone()]) == inputs_hash([x.t().contiguous().t()])
    assert inputs_hash([x]) != inputs_hash([other])


def test_lazily_conjugated_inputs_are_hashed_by_value() -> None:
    """A conjugate that was not written out has the hash of the one that was."""
    x = torch.complex(noise(4), noise(4, seed=1))
    assert inputs_hash([x.conj()]) == inputs_hash([x.conj().resolve_conj()]) != inputs_hash([x])
    assert inputs_hash([x.conj().imag]) == inputs_hash([-x.imag])
