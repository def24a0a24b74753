"""The real TensorRT-RTX builder accepts the cast graphs: strongly typed, without a GPU."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from calib import calibrate
from engines.demo import EnergyClassifier
from passes import classify, insert_casts

CHILD = Path(__file__).parent / "rtx_builder.py"


def has_builder():
    try:
        return metadata.version("torch-tensorrt-rtx").startswith("2.14")
    except metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")


class Convolutional(nn.Module):
    """Convolutions, batch norm, in-place ReLU, pooling, and an output that fp16 cannot hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))) * 1e6


def mixed_of(model, x, **settings):
    program = torch.export.export(model.eval(), (x,))
    plan = classify(program, calibrate(program, [x], progress=False), **settings)
    return insert_casts(program, plan), plan


def built(mixed, path):
    torch.export.save(mixed, path)
    done = subprocess.run([sys.executable, str(CHILD), str(path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rsplit("engine bytes:", 1)[1])


@pytest.mark.parametrize("low_type", ["float16", "bfloat16"])
def test_the_builder_accepts_a_mixed_convolutional_network(tmp_path, low_type):
    torch.manual_seed(0)
    mixed, plan = mixed_of(Convolutional(), torch.randn(2, 3, 16, 16), low_precision_type=low_type)
    assert plan.low_precision_nodes
    assert "mul" in plan.high_precision_nodes
    assert built(mixed, tmp_path / "mixed.pt2") > 1000


def test_the_builder_accepts_the_demos_network(tmp_path):
    torch.manual_seed(0)
    mixed, plan = mixed_of(EnergyClassifier(), torch.rand(10, 64) * 255)
    assert {"sum_1", "mul_1"} <= set(plan.high_precision_nodes)
    assert built(mixed, tmp_path / "mixed.pt2") > 1000
