"""What the real TensorRT-RTX builder takes in fp32 as one network, it takes cast, strongly typed. Without a GPU.

Builders run in one child process, started anew when it crashes. By default a third of the zoo, chosen to have every
kind of layer; the rest is slow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

import pytest

for package in ("timm", "torchvision", "transformers"):
    pytest.importorskip(package)

from benchmarks.isolation import Worker  # noqa: E402
from benchmarks.zoo import ZOO  # noqa: E402


def has_builder() -> bool:
    try:
        return metadata.version("torch-tensorrt-rtx").startswith("2.14")
    except metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
BY_DEFAULT = frozenset(
    """
    resnet densenet mobilenet_v3 convnext efficientnet shufflenet vit beit xcit eva swin_v2 mixer unet diffusion_unet
    restoration albert gpt2 llama gemma2 mamba lstm_cells wavenet dlrm two_towers pointnet coupling_flow boolean_mask
    infinite_mask finite_mask finite_mask_attention autocast_regions complex_rotary partly_half stated_types factories
    many_outputs
    """.split()  # noqa: SIM905 - a list of words reads as one
)
MODELS = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in ZOO]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A child process that exports, casts and builds."""
    with Worker([sys.executable, "-m", "benchmarks.zoo.worker"], limit_s=400) as worker:
        yield worker


@pytest.mark.parametrize("name", MODELS)
def test_what_is_taken_in_fp32_is_taken_cast(worker: Worker, name: str) -> None:
    """With the settings that `build` gives such a plan. What fp32 itself is refused for says so, and is no failure."""
    reference = worker.ask({"ask": "build", "model": name, "type": "fp32"})
    if "failure" in reference:
        assert name not in BY_DEFAULT, reference["failure"]
        pytest.skip(f"TensorRT-RTX does not take the fp32 graph: {reference['failure']}")
    for low_type in ("fp16", "bf16"):
        cast = worker.ask({"ask": "build_cast", "model": name, "type": low_type})
        assert "result" in cast, f"{low_type}: {cast['failure']}\n{worker.log()}"
        assert cast["result"]["bytes"] > 1000


def test_a_crash_costs_one_answer(worker: Worker) -> None:
    """The caller lives, is told the signal, and the next job is answered."""
    assert worker.ask({"ask": "crash", "model": "", "type": ""}) == {"failure": "crashes: SIGSEGV"}
    assert "unknown" in worker.ask({"ask": "nothing", "model": "vit", "type": "fp32"})["failure"]


def test_a_job_that_takes_too_long_is_given_up() -> None:
    with Worker([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.5) as worker:
        assert worker.ask({}) == {"failure": "hangs: no answer in 0.5 s"}
