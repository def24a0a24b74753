"""Sizes that the export left open have the user's names."""

from __future__ import annotations

from pathlib import Path

import torch
from calibcast.calib import calibrate
from calibcast.calib.dimension_names import dimension_names, named_size
from torch import nn
from torch.export import Dim, ExportedProgram


class Product(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ y.T, x @ y.T])


def exported(first: object, second: object) -> ExportedProgram:
    shapes = {"x": {0: first}, "y": {0: second}}
    return torch.export.export(Product(), (torch.ones(8, 3), torch.ones(5, 3)), dynamic_shapes=shapes)


def output_size(program: ExportedProgram) -> list[str]:
    names = dimension_names(program)
    (output,) = next(iter(reversed(program.graph.nodes))).args[0]
    return [named_size(size, names) for size in output.meta["val"].shape]


def test_sizes_have_the_names_of_the_users_dims() -> None:
    assert output_size(exported(Dim("batch"), Dim("other"))) == ["2*batch", "other"]


def test_a_size_derived_from_a_dim_is_said_by_it() -> None:
    assert output_size(exported(2 * Dim("half"), Dim("other")))[0] == "4*half"


def test_a_size_without_a_name_is_said_by_its_input(tmp_path: Path) -> None:
    """`Dim.AUTO` has none, and a file keeps none."""
    program = exported(Dim("batch"), Dim.AUTO)
    assert output_size(program) == ["2*batch", "y[0]"]
    torch.export.save(program, tmp_path / "p.pt2")
    assert output_size(torch.export.load(tmp_path / "p.pt2")) == ["2*x[0]", "y[0]"]


def test_the_range_table_has_the_names() -> None:
    program = exported(Dim("batch"), Dim("other"))
    ranges = calibrate(program, [(torch.ones(4, 3), torch.ones(5, 3))], progress=False, rounding_batches=0)
    shapes = dict(ranges.frame.select("node", "shape").iter_rows())
    assert shapes["x"] == ["batch", "3"]
    assert shapes["cat"] == ["2*batch", "other"]
