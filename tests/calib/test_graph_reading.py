"""What a graph says about its nodes: names, arguments, places, kinds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibcast.calib.graph import (
    argument_at,
    argument_of,
    as_list,
    base_op,
    child_of,
    dtype_name,
    input_kinds,
    input_targets,
    is_bitcast,
    is_measurable,
    is_transposed,
    module_path,
    op_name,
    producer_of,
    program_device,
    same_device,
    size_hint,
    source_line,
    state_tensor,
    tensor_specs,
    tensor_values,
    walk,
    where,
)
from torch import fx, nn
from torch.export import ExportedProgram

aten = torch.ops.aten


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Inner())
        self.register_buffer("scale", torch.ones(4))
        self.free = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> Any:
        h = self.inner(self.inner(x)) * self.scale
        a, b = h.split(2, -1)
        with torch.autocast("cpu", torch.bfloat16):
            c = a @ b.t()
        return c.float() + torch.tensor(3.0), n + 1, self.free * 1


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(Net().eval(), (torch.ones(2, 4), torch.ones(2, dtype=torch.int64)))


def named(program: ExportedProgram) -> dict[str, fx.Node]:
    return {step.name: step.node for step in walk(program.graph_module)}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.add.Tensor, "add"), (aten.add_.Tensor, "add"), (aten.divide.Tensor, "div"),
        (aten._softmax.default, "_softmax"),
        (aten.__and__.Tensor, "__and__"), (torch.ops.prims.convert_element_type.default, "convert_element_type"),
        (torch.relu, ""), ("linear", ""), (torch.ops.quantized.add.default, ""),
    ],
)  # fmt: skip
def test_operators_have_one_name(target: Any, name: str) -> None:
    assert base_op(target) == name


def test_targets_are_shown_in_full_or_by_name() -> None:
    assert (op_name(aten.add.Tensor), op_name(torch.relu), op_name("x")) == ("aten.add.Tensor", "relu", "x")
    assert (is_bitcast(aten.view.dtype), is_bitcast(aten.view.default), is_bitcast(torch.relu)) == (True, False, False)
    assert [as_list(v) for v in (None, 3, (1, 2), [1])] == [[], [3], [1, 2], [1]]
    assert [is_measurable(t) for t in (torch.float16, torch.float64, torch.int32, torch.complex64)] == [
        True,
        True,
        False,
        False,
    ]
    assert dtype_name(torch.bfloat16) == "bfloat16"


def call(function: Callable[..., Any], *args: torch.Tensor) -> fx.Node:
    class Made(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return function(*inputs)

    graph = torch.export.export(Made(), args).graph
    return [n for n in graph.nodes if n.op == "call_function"][-1]


def test_arguments_are_found_by_name_and_by_place() -> None:
    node = call(lambda x: x.clamp(max=2.0), torch.ones(3))
    assert (argument_of(node, "min"), argument_of(node, "max"), argument_of(node, "nothing")) == (None, 2.0, None)
    assert (argument_at(node, 1), argument_at(node, 2), argument_at(node, 3)) == (None, 2.0, None)
    added = call(lambda x: torch.add(x, x, alpha=3), torch.ones(3))
    assert (argument_of(added, "alpha"), argument_at(added, 2)) == (3, 3)
    assert argument_of(call(lambda x: x + x, torch.ones(3)), "alpha") == 1  # its default
    getitem = call(lambda x: x.split(1)[2], torch.ones(3))
    assert (argument_of(getitem, "index"), argument_at(getitem, 1), argument_at(getitem, 2)) == (None, 2, None)
    assert producer_of(getitem) == (getitem.args[0], 2)
    assert producer_of(added) == (added, None)


def test_transposed_convolutions_are_known_by_name_or_flag() -> None:
    x, w = torch.ones(1, 2, 5), torch.ones(2, 3, 2)
    assert is_transposed(call(torch.nn.functional.conv_transpose1d, x, w))
    assert not is_transposed(call(torch.nn.functional.conv1d, x, w.transpose(0, 1).contiguous()))
    for flag in (True, False):
        weight = w if flag else w.transpose(0, 1).contiguous()
        node = call(lambda x, w, f=flag: aten.convolution.default(x, w, None, [1], [0], [1], f, [0], 1), x, weight)
        assert is_transposed(node) is flag


def test_sizes_have_hints() -> None:
    assert size_hint(5) == 5
    assert size_hint(SimpleNamespace(node=SimpleNamespace(hint=7))) == 7
    assert size_hint(SimpleNamespace(node=SimpleNamespace(hint=None))) == 1


def test_regions_are_walked_with_their_names(program: ExportedProgram) -> None:
    steps = list(walk(program.graph_module))
    inside = [step for step in steps if step.inside]
    assert inside
    assert all("." in step.name for step in inside)
    assert not any("." in step.name for step in steps if not step.inside)
    regions = [n for n in program.graph.nodes if child_of(n) is not None]
    assert len(regions) == 1
    name, child = child_of(regions[0]) or ("", None)
    assert {f"{name}.{n.name}" for n in child.graph.nodes} == {step.name for step in inside}
    assert child_of(next(iter(program.graph.nodes))) is None


def test_nodes_say_which_module_and_line_made_them(program: ExportedProgram) -> None:
    nodes = named(program)
    assert [module_path(nodes[name]) for name in ("linear", "linear_1", "relu", "mul")] == [
        "inner.0",
        "inner.0",
        "inner.1",
        "",
    ]
    assert source_line(nodes["relu"]).endswith(f"test_graph_reading.py:{Inner.forward.__code__.co_firstlineno + 1}")
    assert "test_graph_reading.py" in source_line(nodes["linear"])  # not torch.nn's own line
    assert where(nodes["relu"]).startswith("node relu (inner.1, ")
    assert where(nodes["relu"], "other").startswith("node other (inner.1, ")
    assert where(nodes["x"]) == "node x"


def test_a_line_inside_torch_is_told_where_there_is_no_other() -> None:
    def traced(*files: str) -> fx.Node:
        node = fx.Graph().placeholder("x")
        node.meta["stack_trace"] = "\n".join(
            f'  File "{file}", line {i + 7}, in forward\n    x = y' for i, file in enumerate(files)
        )
        return node

    inside = "/lib/torch/nn/modules/linear.py"
    assert source_line(traced("/me/net.py", inside)) == "/me/net.py:7"
    assert source_line(traced(inside)) == f"{inside}:7"
    assert source_line(traced(inside, "/me/net.py", "/me/more.py")) == "/me/more.py:9"
    assert source_line(traced()) == ""
    # A function or a file may have any name.
    node = SimpleNamespace(meta={"stack_trace": '  File "/line, 3/a.py", line 12, in pipeline, line 9'})
    assert source_line(node) == "/line, 3/a.py:12"  # type: ignore[arg-type]


def test_inputs_have_kinds_and_targets(program: ExportedProgram) -> None:
    kinds = input_kinds(program)
    assert {name: kind for name, kind in kinds.items() if kind != "constant"} == {
        "p_inner_0_weight": "parameter", "p_inner_0_bias": "parameter", "p_free": "parameter", "b_scale": "buffer",
        "x": "input", "n": "input",
    }  # fmt: skip
    targets = input_targets(program)
    assert (targets["p_inner_0_weight"], targets["b_scale"]) == ("inner.0.weight", "scale")
    assert not {"x", "n"} & targets.keys()
    assert torch.equal(state_tensor(program, "scale"), torch.ones(4))  # type: ignore[arg-type]
    assert state_tensor(program, "nothing") is None
    assert program_device(program) == torch.device("cpu")


def test_specs_are_of_tensors_with_a_range(program: ExportedProgram) -> None:
    specs = {(spec.node, spec.output): spec for spec in tensor_specs(program)}
    assert {spec.kind for spec in specs.values()} >= {"parameter", "buffer", "input", "activation"}
    assert ("n", 0) not in specs
    assert ("add_1", 0) not in specs  # integers
    assert {output for name, output in specs if name == "split"} == {0, 1}
    assert (specs["split", 1].shape, specs["split", 1].op) == (("2", "2"), "aten.split.Tensor")
    weight, x = specs["p_inner_0_weight", 0], specs["x", 0]
    assert (weight.module, weight.op, weight.dtype, weight.shape) == ("inner.0", "placeholder", "float32", ("4", "4"))
    assert (x.module, x.kind) == ("", "input")
    assert any("." in name for name, _ in specs)  # inside the region
    assert not any(name.startswith("getitem") for name, _ in specs)
    every = {spec.node for spec in tensor_specs(program, lambda dtype: True)}
    assert "n" in every
    values = named(program)["split"]
    assert [i for i, _ in tensor_values(values)] == [0, 1]


def test_devices_are_the_same_by_type_and_number() -> None:
    cpu, first, second = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
    assert same_device(cpu, cpu)
    assert not same_device(cpu, first)
    assert same_device(first, torch.device("cuda"))  # a process that has not started CUDA is on the first
    assert not same_device(first, second)
    assert not same_device(torch.device("cuda"), second)
