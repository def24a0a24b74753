"""Where rescaling is not shown to be exact: the place at which products vanish."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from calibcast.passes.rescaling.exactness import _least, _vanishing
from calibcast.passes.rescaling.measures import Measures
from torch import fx


def product() -> fx.Node:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * y

    graph = torch.export.export(Net(), (torch.ones(2), torch.ones(2))).graph
    return next(node for node in graph.nodes if node.op == "call_function")


def measures(**smallest: float) -> Measures:
    rows: dict[Any, int] = {(name, 0): row for row, name in enumerate(smallest)}
    return cast(Measures, SimpleNamespace(rows=rows, smallest=list(smallest.values())))


@pytest.mark.parametrize(
    ("x", "y", "vanishes"),
    [
        (2.0**-63, 2.0**-63, False),  # 2^-126, the smallest normal number, is still there in full
        (2.0**-63, 2.0**-64, True),
        (2.0**-100, 1.0, False),
        (2.0**-100, 2.0**-100, True),
        (0.0, 2.0**-140, False),  # all zeros: nothing to lose
    ],
)
def test_a_product_that_may_underflow_is_told(x: float, y: float, vanishes: bool) -> None:
    assert bool(list(_vanishing(product(), measures(x=x, y=y)))) is vanishes


def test_the_least_magnitude_of_what_was_not_seen_is_none() -> None:
    x, y = product().all_input_nodes
    seen = measures(x=0.0)
    assert (_least(seen, x, 0), _least(seen, y, 0), _least(measures(x=3.0), x, 0)) == (None, None, 3.0)
