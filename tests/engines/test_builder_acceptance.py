"""What the real TensorRT-RTX builder takes in fp32 as one network, it takes cast, strongly typed. Without a GPU.

Builders run in one child process, started again when it crashes. By default a third of the zoo, chosen to have every
kind of layer that it takes; the rest is slow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

for package in ("timm", "torchvision", "transformers"):
    pytest.importorskip(package)

from benchmarks.isolation import Worker  # noqa: E402
from benchmarks.rtx_builder import has_builder  # noqa: E402
from benchmarks.zoo import ZOO  # noqa: E402

pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")
FP16 = frozenset(
    """
    resnet densenet mobilenet_v3 convnext efficientnet shufflenet mambaout vit deit_distilled beit eva mixer unet
    diffusion_unet restoration gpt2 llama mamba mamba2 wavenet dlrm boolean_mask infinite_mask finite_mask
    finite_mask_attention autocast_regions partly_half stated_types factories
    """.split()  # noqa: SIM905 - a list of words reads as one
)
BF16 = frozenset({"resnet", "vit", "unet", "gpt2", "mamba2", "dlrm", "partly_half", "finite_mask_attention"})
BY_DEFAULT = {("fp16", name) for name in FP16} | {("bf16", name) for name in BF16}


def marks(name: str, low_type: str) -> list[pytest.MarkDecorator]:
    return [] if (low_type, name) in BY_DEFAULT else [pytest.mark.slow]


CASES = [pytest.param(name, low_type, marks=marks(name, low_type)) for name in ZOO for low_type in ("fp16", "bf16")]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A child process that exports, casts and builds."""
    with Worker([sys.executable, "-m", "benchmarks.zoo.worker"], limit_s=400) as worker:
        yield worker


@pytest.fixture(scope="module")
def in_fp32(worker: Worker) -> Callable[[str], dict[str, Any]]:
    """What the builder says to the fp32 graph of a model."""
    return cache(lambda name: worker.ask({"ask": "build", "model": name, "type": "fp32"}))


@pytest.mark.parametrize(("name", "low_type"), CASES)
def test_what_is_taken_in_fp32_is_taken_cast(
    worker: Worker, in_fp32: Callable[[str], dict[str, Any]], name: str, low_type: str
) -> None:
    """With the settings that `build` gives such a plan. Where fp32 itself is refused, it is said why."""
    reference = in_fp32(name)
    if "failure" in reference:
        assert (low_type, name) not in BY_DEFAULT, reference["failure"]
        pytest.skip(f"TensorRT-RTX does not take the fp32 graph: {reference['failure']}")
    cast = worker.ask({"ask": "build_cast", "model": name, "type": low_type})
    assert "result" in cast, f"{cast['failure']}\n{worker.log()}"
    assert cast["result"]["bytes"] > 1000


def test_a_crash_costs_one_answer(worker: Worker) -> None:
    """The caller lives, is told the signal, and the next job is answered."""
    assert worker.ask({"ask": "crash", "model": "", "type": ""}) == {"failure": "crashes: SIGSEGV"}
    assert "unknown" in worker.ask({"ask": "nothing", "model": "vit", "type": "fp32"})["failure"]


def test_a_job_that_takes_too_long_is_given_up() -> None:
    with Worker([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.5) as worker:
        assert worker.ask({}) == {"failure": "hangs: no answer in 0.5 s"}
