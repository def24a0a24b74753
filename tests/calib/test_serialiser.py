"""Files of programs are the same, and read the same, without the work that torch's serialiser throws away."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path

import torch
from calibcast.calib.artifacts import load_program, save_program


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.total.add_(x.sum(0))
        return {"out": torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.linear(x),)) + self.total}


def test_the_file_is_what_torch_writes_and_nothing_stays_changed(tmp_path: Path) -> None:
    module = importlib.import_module("torch._export.serde.serialize")
    before = module.canonicalize, module.typing
    program = torch.export.export(Net().eval(), (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(program, tmp_path / "torch.pt2")
    save_program(program, tmp_path / "ours.pt2")
    parts = []
    for name in ("torch", "ours"):
        with zipfile.ZipFile(tmp_path / f"{name}.pt2") as file:
            parts.append({n.partition("/")[2]: file.read(n) for n in file.namelist() if "models/" in n})
    assert parts[0] == parts[1] != {}
    theirs, ours = torch.export.load(tmp_path / "ours.pt2"), load_program(tmp_path / "torch.pt2")
    assert str(theirs.graph) == str(ours.graph)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours.module()(x), theirs.module()(x), rtol=0, atol=0)
    assert (module.canonicalize, module.typing) == before
