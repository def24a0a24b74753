"""Where an engine may be loaded, and what it says elsewhere."""

import pytest
from calibcast.calib import MismatchError
from calibcast.engines.tensorrt.compatibility import check_compatible

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
