"""What messages advise for the first mistakes that people make with their data."""

import re
import warnings

import numpy as np
import pytest
import torch
from calibcast import CalibcastError
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import BatchError
from torch import nn

IMAGES = torch.export.export(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 8),))


def advice(batch):
    with pytest.raises(BatchError) as caught:
        calibrate(IMAGES, [batch], progress=False, rounding_batches=0)
    return str(caught.value)


def test_pixels_as_image_files_have_them_are_told_to_be_permuted_and_converted():
    said = advice(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert "got uint8[2, 8, 8, 3]" in said
    assert ".permute(0, 3, 1, 2).to(torch.float32), and scale the pixels as in training" in said
    assert "channels come last" in said


def test_pixels_with_their_channels_first_are_only_converted():
    said = advice(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert "for example .to(torch.float32), and scale the pixels" in said
    assert "permute" not in said


def test_an_array_of_numpy_is_told_how_to_become_a_tensor():
    said = advice(np.zeros((2, 3, 8, 8), np.float32))
    assert said.startswith("batch 0 is a ndarray; the program takes (input: float32[2, 3, 8, 8]).")
    assert said.endswith("Convert it in transform= with torch.from_numpy.")


def test_an_input_that_is_zero_in_all_batches_is_told():
    with pytest.warns(UserWarning, match="1 input held nothing but zeros, in every batch: input. Check how"):
        calibrate(IMAGES, [torch.zeros(2, 3, 8, 8)] * 2, progress=False, rounding_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(IMAGES, [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)], progress=False, rounding_batches=0)


def test_a_loader_that_raises_is_told_with_the_line_of_its_own_code(tmp_path, monkeypatch):
    from calibcast.engines.locations import load_data

    (tmp_path / "mine.py").write_text("import json\n\ndef data():\n    yield json.loads('{')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BatchError, match=r"raised JSONDecodeError at batch 0, .* \(.*mine\.py:4\)"):
        calibrate(IMAGES, load_data("mine.py:data"), progress=False, rounding_batches=0)


def test_a_list_of_batches_serves_as_a_location_of_data(tmp_path, monkeypatch):
    from calibcast.engines.locations import load_data

    (tmp_path / "mine.py").write_text("batches = [1, 2]\nname = 'x'\n\ndef number():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_data("mine.py:batches") == [1, 2]
    for name, came in (("name", "is a str"), ("number", "returned a int")):
        with pytest.raises(
            CalibcastError,
            match=re.escape(f"mine.py:{name} {came}, which cannot be iterated over batches: give a function"),
        ):
            load_data(f"mine.py:{name}")
    with pytest.raises(CalibcastError, match="has no function 'batch'"):
        load_data("mine.py:batch")


def test_a_location_that_names_nothing_is_told_without_running_the_file(tmp_path, monkeypatch):
    from calibcast.engines.locations import check_location

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise RuntimeError\n\ndef batches():\n    pass\n\nlisted = []\n")
    with pytest.raises(CalibcastError, match=r"mine.py has no function 'batch'; near names: batches"):
        check_location("mine.py:batch")
    check_location("mine.py:listed")
    (tmp_path / "open.py").write_text("from other import *\n")
    check_location("open.py:anything")
