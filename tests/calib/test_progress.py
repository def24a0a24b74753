"""The bar that a person watches: batches, rate, and how many tensors are beyond fp16 already."""

import io
import re
import sys

import pytest
import torch
from calibcast.calib import calibrate
from torch import nn


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Squares(nn.Module):
    def forward(self, x):
        return (x * x) * x


@pytest.fixture
def program():
    return torch.export.export(Squares(), (torch.ones(4),))


def shown(program, monkeypatch, stream, **arguments):
    monkeypatch.setattr(sys, "stderr", stream)
    calibrate(program, [torch.full((4,), 300.0)] * 3, **arguments)
    return stream.getvalue()


def test_a_terminal_sees_batches_rate_and_tensors_above_65504(program, monkeypatch):
    text = shown(program, monkeypatch, Terminal())
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("calibrate: 100%")
    assert "3/3" in last
    assert re.search(r"\d ?batch/s|s/batch", last)
    assert "2 tensors above 65504" in last  # x * x is 90,000 and x * x * x is more; x is 300


def test_a_log_file_sees_no_bar_and_progress_false_shows_none(program, monkeypatch):
    assert shown(program, monkeypatch, io.StringIO()) == ""
    assert shown(program, monkeypatch, Terminal(), progress=False) == ""
