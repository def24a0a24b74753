"""A plan says what its graph does: what a graph has to keep in fp32 is high in the plan, with a reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.passes import PrecisionPlan, classify, insert_casts, tune, what_if
from calibcast.passes.node_types import NodeTypes
from calibcast.passes.regions import flatten, qualified_name
from torch import nn
from torch.export import ExportedProgram

LOW_TYPES = (torch.float16, torch.bfloat16)


@torch.library.custom_op("plan_tests::fp32_only", mutates_args=())
def fp32_only(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@fp32_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("takes fp32 only")
    return torch.empty_like(x)


class Filled(nn.Module):
    """-1e9 is refused by fp16's kernel, and not by that of bf16."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return (x @ x).masked_fill(x > 1, -1e9).softmax(-1)


class OfIntegers(nn.Module):
    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x * (i / 3) + i.sum() * 0.5


class Custom(nn.Module):
    """The last two are tied to what refuses: they share storage that is written in place."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        y = fp32_only(x.tanh())
        y.view(-1).add_(1.0)
        return y.sin()


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4, 4))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        self.state.copy_(x @ x)
        return self.state @ x


class Product(nn.Module):
    """Autocast runs the product low; what writes into it has a number that fp16's kernel refuses."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        y = x @ x
        y.view(-1).clamp_(max=1e6)
        return y.sum() + torch.full((4,), 1e30).sum()


MODELS = (Filled, OfIntegers, Custom, Buffer, Product)
ARGS = (torch.linspace(0.1, 0.9, 16).reshape(4, 4), torch.arange(4))


def program_of(model: type[nn.Module]) -> ExportedProgram:
    return torch.export.export(model().eval(), ARGS)


def low_in_the_graph(program: ExportedProgram, mixed: ExportedProgram, low_type: torch.dtype) -> set[str]:
    """The planned nodes whose floating arguments, or where there are none, results, are in the low type."""
    names = {node.name: node for node in mixed.graph.nodes}

    def types(node: torch.fx.Node) -> set[torch.dtype]:
        values = [v for v in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
        return {v.dtype for v in values if v.is_floating_point()}

    found = set()
    for node in program.graph.nodes:
        made = names[node.name]
        reads = set().union(*map(types, made.all_input_nodes))
        if node.op == "call_function" and (reads or types(made)) == {low_type}:
            found.add(node.name)
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def plans(program: ExportedProgram, low_type: torch.dtype) -> dict[str, PrecisionPlan]:
    ranges = calibrate(program, [ARGS], progress=False)
    everything = {"low_precision_type": low_type, "nodes_to_include": [".*"]}
    return {
        "classify": classify(program, ranges, low_type),
        "all included": classify(program, ranges, **everything),
        "without ranges": classify(program, None, **everything),
        "tune": tune(program, ranges, [ARGS], low_precision_type=low_type, min_sqnr_db=1.0),
        "autocast": PrecisionPlan.from_autocast(program, low_type),
        "autocast on the host": PrecisionPlan.from_autocast(program, low_type, "cpu"),
    }


@pytest.mark.parametrize("low_type", LOW_TYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_low_nodes_of_a_plan_are_those_of_its_graph(
    model: type[nn.Module], low_type: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    program = program_of(model)
    made = plans(program, low_type)
    caplog.clear()  # `tune` says where none of the work can be low
    for name, plan in made.items():
        with caplog.at_level(logging.WARNING):
            mixed = insert_casts(program, plan)
        settled = {qualified_name(n) for n in NodeTypes.of(flatten(program.graph_module), plan).low}
        assert set(plan.low_precision_nodes) == settled, name
        assert set(plan.low_precision_nodes) <= low_in_the_graph(program, mixed, low_type), name
        present = PrecisionPlan.from_types(mixed)
        assert set(present.low_precision_nodes) >= set(plan.low_precision_nodes), name
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("model", "node", "said"),
    [
        (Filled, "masked_fill", r"its kernel refuses -1e\+09, which float16 does not hold"),
        (OfIntegers, "div", "it reads no floating-point tensor, and gives float32 of itself"),
        (Custom, "fp32_only", "takes fp32 only"),
        (Custom, "add_", "it shares storage, written in place, with fp32_only, which is high"),
        (Buffer, "copy_", "an in-place op writes into b_state, which keeps its type"),
    ],
)
def test_the_plan_says_why_a_node_that_was_asked_for_stays(model: type[nn.Module], node: str, said: str) -> None:
    program = program_of(model)
    ranges = calibrate(program, [ARGS], progress=False)
    for plan in (classify(program, ranges, nodes_to_include=[".*"]), classify(program, None, nodes_to_include=[".*"])):
        decision = plan[node]
        assert (decision.precision, decision.rule in {"legality", "alias"}) == ("high", True)
        assert said.replace("\\", "") in decision.reason
        assert said.replace("\\", "") in decision.verdicts[0].reason
        assert node in plan.high_precision_nodes
    flips = classify(program, ranges, nodes_to_include=[".*"]).flips["float16"]
    assert flips[node] is None
    with_it = what_if(program, ranges, data_max=[float("inf")])
    assert with_it.height == 1


def test_what_autocast_runs_low_and_the_graph_cannot_is_high_with_both_reasons() -> None:
    plan = PrecisionPlan.from_autocast(program_of(Product), torch.float16)
    assert plan["matmul"].precision == "high"
    assert plan["matmul"].rule == "alias"
    assert plan["matmul"].reason.startswith("torch.autocast runs it in the low type, but it shares storage")
    assert plan["matmul"].verdicts[0].rule == "alias"


def test_a_plan_by_hand_that_the_graph_does_not_follow_is_warned_of(
    plan_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one of another version of torch. Ties and numbers are named, too, not only what an operator refuses."""
    program = program_of(Custom)
    with caplog.at_level(logging.WARNING, logger="calibcast"):
        insert_casts(program, plan_of(program, {"fp32_only", "view", "add_", "sin"}))
    assert any("node fp32_only" in said and "takes fp32 only" in said for said in warnings(caplog))
    assert any("node add_" in said and "it shares storage" in said for said in warnings(caplog))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="calibcast"):
        insert_casts(program_of(Filled), plan_of(program_of(Filled), {"masked_fill"}))
    assert len(warnings(caplog)) == 1
    assert "its kernel refuses -1e+09" in warnings(caplog)[0]


def test_autocast_is_replayed_without_torchs_own_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    class Inverse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x @ x)

    program = torch.export.export(Inverse(), (torch.eye(4),))
    with caplog.at_level(logging.ERROR):
        assert PrecisionPlan.from_autocast(program, torch.float16)["linalg_inv"].precision == "high"
    assert warnings(caplog) == []
