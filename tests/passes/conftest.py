"""What the tests of `passes` share: exporting, hand-made plans, pictures of graphs, and the laws of cast insertion.

All fixtures are functions and live as long as the session, so that Hypothesis may use them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from calibcast.calib.graph import base_op, dtype_name, op_name, tensor_values
from calibcast.passes import PrecisionPlan
from torch import fx, nn
from torch.export import ExportedProgram

from benchmarks.fuzz.case import Case, made_case, plan_by_hand, run_checked
from benchmarks.fuzz.laws import LAWS

_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


class _Function(nn.Module):
    """A module that calls a function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any) -> Any:
        return self._function(*args)


@pytest.fixture(scope="session")
def export() -> Callable[..., ExportedProgram]:
    """export(module or function, *args, dynamic_shapes=None): its program, in eval mode."""

    def export(model: Any, *args: Any, dynamic_shapes: Any = None) -> ExportedProgram:
        module = model if isinstance(model, nn.Module) else _Function(model)
        return torch.export.export(module.eval(), args, dynamic_shapes=dynamic_shapes)

    return export


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., PrecisionPlan]:
    """plan_of(program, low, low_type): a plan made by hand, see `benchmarks.fuzz.case`."""
    return plan_by_hand


@pytest.fixture(scope="session")
def picture() -> Callable[[ExportedProgram], list[str]]:
    """picture(program): a line per computed node, `name: op types`, and the output, `output: names`.

    A cast that insertion added is `name: cast TYPE <- input`; `getitem` is left out.
    """

    def picture(program: ExportedProgram) -> list[str]:
        return [line for node in program.graph.nodes if (line := _line(node))]

    return picture


def _line(node: fx.Node) -> str | None:
    if node.op == "output":
        return f"output: {', '.join(str(result) for result in node.args[0])}"
    if node.op != "call_function" or node.target is getitem:
        return None
    types = " ".join(_SHORT.get(v.dtype, dtype_name(v.dtype)) for _, v in tensor_values(node))
    if node.name.endswith(("_as_float16", "_as_bfloat16", "_as_float32")):
        return f"{node.name}: cast {types} <- {node.args[0]}"
    return f"{node.name}: {base_op(node.target) or op_name(node.target)} {types}".rstrip()


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Any]]:
    """run(program, *inputs): the flat outputs, having held each node's real tensors to its metadata."""
    return run_checked


@pytest.fixture(scope="session")
def case_of() -> Callable[..., Case]:
    """case_of(program, plan, inputs, smooth): the case that the laws speak of."""
    return made_case


@pytest.fixture(scope="session", params=LAWS, ids=lambda law: law.__name__)
def law(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """One law of cast insertion: called with a case, it asserts."""
    return request.param


@pytest.fixture(scope="session")
def laws() -> tuple[Callable[[Case], None], ...]:
    """All laws of cast insertion."""
    return LAWS
