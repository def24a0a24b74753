"""Guards whose loss no other test would notice: found by changing them and seeing nothing fail."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from calibcast.engines.judging.attribution import _blame
from calibcast.engines.judging.metrics import OutputError
from calibcast.passes.cast_sites import Value, _undone

ROOT = Path(__file__).parents[1]


def _with_error(relative: float) -> OutputError:
    error, reference = OutputError("output"), torch.ones(100, dtype=torch.float64)
    error.update(reference * (1 + relative), reference, 0)
    return error


@pytest.mark.parametrize(
    ("plan", "engine", "blame"),
    [(0.03, 0.01, "plan"), (0.01, 0.03, "engine"), (0.015, 0.01, "both"), (0.01, 0.015, "both"), (0.0, 0.0, "none")],
)
def test_one_part_is_to_blame_alone_when_its_error_is_over_twice_the_others(
    plan: float, engine: float, blame: str
) -> None:
    """Of one half more than the other's, both are."""
    assert _blame(_with_error(plan), _with_error(engine)) == blame


def test_a_conversion_is_undone_only_where_that_loses_nothing() -> None:
    """fp16 -> fp32 -> fp16 may go, fp32 -> fp16 -> fp32 may not, nor what went through the other low type."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for narrow, wide, wanted, goes in (
        (half, single, half, True),
        (brain, single, brain, True),
        (single, half, single, False),
        (half, brain, half, False),
        (brain, half, brain, False),
        (half, single, brain, False),
    ):
        before = Value((narrow,))
        assert (_undone(Value((wide,), before), wanted) is before) == goes
    assert _undone(Value((single,)), half) is None


def test_imports_make_no_circle() -> None:
    """What modules import when they are imported themselves can be put in an order."""
    files = {path: ".".join(("calibcast", *path.relative_to(ROOT).with_suffix("").parts)) for path in _files()}
    names = {name.removesuffix(".__init__") for name in files.values()}
    graph = {
        name.removesuffix(".__init__"): {
            n for n in _imported(path) if n in names and n != name.removesuffix(".__init__")
        }
        for path, name in files.items()
    }
    assert tuple(TopologicalSorter(graph).static_order())


def _files() -> list[Path]:
    return [path for package in ("calib", "passes", "engines") for path in (ROOT / package).rglob("*.py")]


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found
