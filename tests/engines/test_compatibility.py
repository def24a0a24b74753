"""Where an engine may be loaded, and what it says elsewhere."""

import re

import pytest
from calibcast.calib import MismatchError
from calibcast.engines.tensorrt import compatibility
from calibcast.engines.tensorrt.compatibility import check_compatible, gpu_warning, supported_gpu

H200 = {"tensorrt-rtx": "1.4.0.76", "gpu": "NVIDIA H200", "compute_capability": "9.0"}


def test_the_same_gpu_and_version_are_fine():
    check_compatible(H200, H200, ahead_of_time=False)


def test_another_torch_is_fine():
    check_compatible({**H200, "torch": "2.11.0"}, {**H200, "torch": "2.14.1"}, ahead_of_time=False)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({**H200, "gpu": "NVIDIA L40S"}, r"built for NVIDIA H200, and here is NVIDIA L40S.*ahead_of_time=True"),
        ({**H200, "tensorrt-rtx": "1.6.1.120"}, r"tensorrt-rtx 1\.4\.0\.76, and here is tensorrt-rtx 1\.6\.1\.120"),
        (
            {"tensorrt": "11.0", "gpu": "NVIDIA H200"},
            r"built with tensorrt-rtx 1\.4\.0\.76, and here is tensorrt 11\.0",
        ),
        ({"gpu": "NVIDIA H200"}, "here is no tensorrt-rtx"),
    ],
)
def test_another_gpu_or_version_is_refused(present, message):
    with pytest.raises(MismatchError, match=message):
        check_compatible(H200, present, ahead_of_time=False)


def test_an_ahead_of_time_engine_runs_on_any_gpu_that_is_new_enough():
    built = {"tensorrt-rtx": "1.4.0.76"}
    check_compatible(built, H200, ahead_of_time=True)
    with pytest.raises(MismatchError, match=r"compute capability 8\.0 and later, and Tesla T4 has 7\.5"):
        check_compatible(built, {**built, "gpu": "Tesla T4", "compute_capability": "7.5"}, ahead_of_time=True)


@pytest.mark.parametrize(
    ("flavour", "capability", "supported"),
    [
        ("torch-tensorrt-rtx", (8, 6), True),
        ("torch-tensorrt-rtx", (12, 1), True),
        ("torch-tensorrt-rtx", (8, 0), False),
        ("torch-tensorrt-rtx", (9, 0), False),
        ("torch-tensorrt-rtx", (10, 0), False),
        ("torch-tensorrt", (9, 0), True),
        ("torch-tensorrt", (7, 0), False),
    ],
)
def test_a_flavour_supports_what_nvidias_matrix_lists(flavour, capability, supported):
    assert supported_gpu(flavour, capability) is supported


@pytest.mark.parametrize(
    ("flavour", "capability", "warning"),
    [
        (
            "torch-tensorrt-rtx",
            "9.0",
            r"H200 has compute capability 9\.0.*outside of NVIDIA's support.*'calibcast\[ten",
        ),
        ("torch-tensorrt-rtx", "8.9", None),
        ("torch-tensorrt", "9.0", None),
        ("torch-tensorrt", "7.0", r"TensorRT \(7\.5 and later\).*backend='eager'"),
        (None, "9.0", None),
    ],
)
def test_a_gpu_outside_of_support_is_warned_of(monkeypatch, flavour, capability, warning):
    monkeypatch.setattr(compatibility, "installed_flavour", lambda: flavour and (flavour, "2.14.0"))
    monkeypatch.setattr(compatibility, "gpu_facts", lambda: {"gpu": "NVIDIA H200", "compute_capability": capability})
    said = gpu_warning()
    assert said is None if warning is None else re.search(warning, said)
