"""Where an engine may be loaded, and what it says elsewhere."""

import re

import pytest
from calibcast.calib import MismatchError
from calibcast.calib.errors import BuildError
from calibcast.engines.tensorrt import compatibility
from calibcast.engines.tensorrt.builder import torch_tensorrt_adapter as adapter
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


@pytest.fixture
def installed(monkeypatch):
    """Distributions, as the metadata of the wheels name them."""

    def install(**distributions):
        there = {name.replace("_", "-"): version for name, version in distributions.items()}

        def version(name):
            if name not in there:
                raise adapter.metadata.PackageNotFoundError(name)
            return there[name]

        monkeypatch.setattr(adapter.metadata, "version", version)

    return install


def test_the_version_of_tensorrt_is_known_by_whichever_wheel_brought_it(installed):
    """torch-tensorrt 2.14 requires tensorrt-cu13 alone: under that name, no other version was ever refused."""
    installed(torch_tensorrt="2.14.0", tensorrt_cu13="11.1.0.106")
    before = adapter.package_versions()
    assert before == {"torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}
    installed(torch_tensorrt="2.14.0", tensorrt="11.1.0.106", tensorrt_cu13="11.1.0.106")
    check_compatible({**before, "gpu": "A100"}, {**adapter.package_versions(), "gpu": "A100"}, ahead_of_time=False)
    installed(torch_tensorrt="2.14.0", tensorrt_cu13="11.2.0.1")
    with pytest.raises(MismatchError, match=r"tensorrt 11\.1\.0\.106, and here is tensorrt 11\.2\.0\.1"):
        check_compatible({**before, "gpu": "A100"}, {**adapter.package_versions(), "gpu": "A100"}, ahead_of_time=False)


class Recorded:
    """Torch-TensorRT's `dynamo.compile` with the settings of a version, which keeps what it was called with."""

    def __init__(self, *settings):
        self.calls = []
        parameters = ", ".join(f"{name}=None" for name in settings)
        scope = {"calls": self.calls}
        exec(f"def compile(exported_program, arg_inputs=None, kwarg_inputs=None, {parameters}, **kwargs):\n"
             "    calls.append(dict(locals()))", scope)  # fmt: skip
        self.dynamo = type("dynamo", (), {"compile": staticmethod(scope["compile"])})


def test_a_route_of_the_performance_tuner_is_passed_through_where_there_is_one(monkeypatch):
    later = Recorded("build_route", "optimization_level")
    monkeypatch.setattr(adapter, "load_package", lambda: later)
    adapter.compile_program(None, (), {}, {"build_route": "fuse_attention=2", "optimization_level": 5})
    assert later.calls[0]["build_route"] == "fuse_attention=2"
    assert later.calls[0]["optimization_level"] == 5
    monkeypatch.setattr(adapter, "load_package", lambda: Recorded("optimization_level"))
    with pytest.raises(BuildError, match=r"no setting 'build_route'.*Global Performance Tuner needs TensorRT 11\.1"):
        adapter.compile_program(None, (), {}, {"build_route": "fuse_attention=2"})
    with pytest.raises(BuildError, match="no setting 'optimisation_level'; near names: optimization_level"):
        adapter.compile_program(None, (), {}, {"optimisation_level": 5})


@pytest.mark.parametrize("flavour", ["torch-tensorrt-rtx", "torch-tensorrt"])
def test_the_settings_that_only_one_flavour_honours_are_passed_to_both(monkeypatch, flavour):
    """Timing cache, tiling, refit, weight streaming: Torch-TensorRT itself knows what its TensorRT does with them."""
    given = {"timing_cache_path": "/data/timing.bin", "immutable_weights": False, "enable_weight_streaming": True,
             "tiling_optimization_level": "full", "strip_engine_weights": False}  # fmt: skip
    package = Recorded(*given)
    monkeypatch.setattr(adapter, "load_package", lambda: package)
    monkeypatch.setattr(adapter, "installed_flavour", lambda: (flavour, "2.14.0"))
    adapter.compile_program(None, (), {}, given)
    assert {name: package.calls[0][name] for name in given} == given
