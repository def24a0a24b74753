"""Make the fixture of a TensorRT engine's inspector: needs a GPU.

    python tests/engines/make_inspected.py FOLDER

Writes what the installed TensorRT says of the network in `test_inspection.py`, and the listing in its engine.
"""

import json
import sys
from pathlib import Path

import torch
from calibcast.calib import calibrate
from calibcast.engines import build
from calibcast.passes import classify, insert_casts
from torch import nn


class Network(nn.Module):
    """A conv2d, relu, mean, layer_norm and linear in fp16, a mul and a softmax in fp32."""

    def __init__(self):
        super().__init__()
        self.c, self.n, self.l = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.n(torch.relu(self.c(x)).mean((2, 3)))
        return (self.l(hidden) * 1e5).softmax(-1)


def main(folder):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(Network().eval(), (x,))
    ranges = calibrate(program, [x], progress=False)
    plan = classify(program, ranges)
    engine = build(insert_casts(program, plan), plan, ranges, backend="tensorrt", cache=False)
    engine.save(folder / "engine")
    version = next(v for name, v in engine.versions.items() if name in {"tensorrt", "tensorrt-rtx"})
    (text,) = json.loads((folder / "engine" / "tensorrt" / "layers.json").read_text())["inspected"]
    (folder / f"inspected_{version}.json").write_text(text)
    print(engine.ledger, engine.record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
