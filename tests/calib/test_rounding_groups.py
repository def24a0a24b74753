"""Which edges into a call are rounded together, and what each group says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibcast.calib.rounding_edges import rounding_edges
from calibcast.calib.rounding_groups import Group, Rounder
from calibcast.calib.rounding_tape import Call, record
from torch import nn

X = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]])
LOW = torch.float16


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = nn.Parameter(torch.full((3, 3), 0.1)), nn.Parameter(torch.full((3,), 0.7))

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> Any:
        return self.function(x, s, self.w, self.b)


def groups(
    function: Callable[..., Any], s: torch.Tensor | None = None, weights: tuple[str, ...] = ("p_w", "p_b")
) -> tuple[Call, list[Group]]:
    """The last call of a program with edges, and its groups."""
    inputs = (X, torch.tensor(0.1) if s is None else s)
    program = torch.export.export(Net(function), inputs)
    state = [program.state_dict[spec.target] for spec in program.graph_signature.input_specs if spec.target]
    tape = record(program.graph_module, [*state, *inputs])
    call = [one for one in tape.calls if one.node is not None][-1]
    edges = [edge for edge in rounding_edges(program) if edge.node == call.name]
    return call, Rounder(tape, (), weights).groups(call, edges)


def inputs_of(found: list[Group]) -> list[tuple[str, ...]]:
    return [tuple(edge.input for edge in group.edges) for group in found]


@pytest.mark.parametrize(
    ("s", "coherent"),
    [
        (torch.tensor(0.1), True),
        (torch.tensor([0.1]), True),
        (torch.tensor([[0.1]]), True),
        (torch.full((3,), 0.1), False),
    ],
)
def test_one_number_is_coherent(s: torch.Tensor, coherent: bool) -> None:
    _, found = groups(lambda x, s, w, b: x * s, s)
    assert inputs_of(found) == [("x",), ("s",)]
    assert [group.coherent for group in found] == [False, coherent]
    assert [group.apart for group in found] == [(), ()]


def test_a_number_in_the_call_is_a_group_of_its_own() -> None:
    _, found = groups(lambda x, s, w, b: x * 0.1)
    assert inputs_of(found) == [("x",), ("literal:other",)]
    (results,) = found[1].results(LOW) or ()
    assert torch.equal(results, X * float(torch.tensor(0.1).half()))
    assert found[1].coherent
    _, found = groups(lambda x, s, w, b: x * 0.5)
    assert inputs_of(found) == [("x",)]  # both types hold it


def test_results_are_those_of_rounded_inputs() -> None:
    call, found = groups(lambda x, s, w, b: x * s)
    results = [group.results(LOW) for group in found]
    assert [torch.equal(made[0], expected) for made, expected in zip(results, (  # type: ignore[index]
        X.half().float() * 0.1, X * float(torch.tensor(0.1).half())), strict=True)] == [True, True]  # fmt: skip
    exact = X.half().float()
    assert groups(lambda x, s, w, b: x * s, torch.tensor(0.5))[1][1].results(LOW) is None
    assert torch.equal(call.perform({call.inputs[0]: exact})[0], exact * 0.1)


def test_weights_are_rounded_together_and_also_apart() -> None:
    _, found = groups(lambda x, s, w, b: torch.addmm(b, x, w), weights=("p_w", "p_b"))
    assert inputs_of(found) == [("x",), ("p_b", "p_w")]
    assert inputs_of(list(found[1].apart)) == [("p_b",), ("p_w",)]
    assert not found[1].coherent


def test_a_bias_adds_its_error_along_a_dimension() -> None:
    call, found = groups(lambda x, s, w, b: nn.functional.linear(x, w, b))
    by_input = {group.edges[0].input: group for group in found}
    bias = by_input["p_b"]
    assert bias.added is not None
    error = torch.tensor(0.7).half().float() - 0.7
    torch.testing.assert_close(bias.added(LOW), error.expand(3))
    (made,) = bias.results(LOW) or ()
    assert call.outputs[0] is not None
    torch.testing.assert_close(made, call.outputs[0].tensor + error)
    assert bias.along == -1
    image = torch.ones(1, 3, 4, 4)
    conv = torch.export.export(nn.Conv2d(3, 2, 1), (image,))
    state = [conv.state_dict[spec.target] for spec in conv.graph_signature.input_specs if spec.target]
    tape = record(conv.graph_module, [*state, image])
    edges = rounding_edges(conv)
    own = Rounder(tape, (), ("p_weight", "p_bias")).groups(tape.calls[-1], [e for e in edges if e.node == "conv2d"])
    added = next(group for group in own if group.added is not None)
    (made,) = added.results(LOW) or ()
    output = tape.calls[-1].outputs[0]
    assert output is not None
    difference = made - output.tensor
    torch.testing.assert_close(difference[0, :, 0, 0], added.added(LOW), rtol=1e-3, atol=1e-7)  # type: ignore[misc]
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), rtol=1e-3, atol=1e-7)


def test_energies_of_the_makers_errors() -> None:
    for function, expected in (
        (lambda x, s, w, b: torch.addmm(b, x, w), {"p_w": 9 * 0.1, "p_b": 3 * 0.7}),
        (lambda x, s, w, b: nn.functional.layer_norm(x, (3,), b, b * 1.0), None),
    ):
        program = torch.export.export(Net(function), (X, torch.tensor(0.1)))
        state = [program.state_dict[spec.target] for spec in program.graph_signature.input_specs if spec.target]
        tape = record(program.graph_module, [*state, X, torch.tensor(0.1)])
        rounder = Rounder(tape, (), ("p_w", "p_b"))
        call = tape.calls[-1]
        found = rounder.groups(call, [edge for edge in rounding_edges(program) if edge.node == call.name])
        for group in found:
            tensors = [tape.made[edge.input, edge.output].tensor for edge in group.edges if not edge.is_literal]
            if len(tensors) == len(group.edges):
                errors = [float((t.half().float() - t).square().sum()) for t in tensors]
                assert rounder.energies(group, LOW).tolist() == pytest.approx(errors)
        if expected is not None:
            assert {edge.input for group in found for edge in group.edges} == {"x", *expected}
