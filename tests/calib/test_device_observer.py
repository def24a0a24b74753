"""The fused GPU kernels give what the host's give. Without a GPU, Triton's interpreter runs them, slowly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SCRIPT = Path(__file__).parent / "fused_against_host.py"


def test_the_fused_kernels_measure_what_the_host_measures():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / ".package")},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("shape", "order", "reduced", "taken"),
    [
        ((16, 128, 768), (0, 1, 2), (2,), True),  # a layer norm
        ((8, 32, 256, 256), (0, 1, 2, 3), (1,), True),  # over channels, of which neighbours lie far apart
        ((8, 32, 256, 256), (0, 1, 2, 3), (2, 3), True),  # the mean of an image
        ((8, 256, 256, 32), (0, 3, 1, 2), (2, 3), False),  # in channels-last: few slices, long ones, in one another
        ((1 << 24,), (0,), (0,), False),  # one slice
    ],
)
def test_few_long_slices_are_left_to_torch(shape, order, reduced, taken):
    """Each program goes through its slices alone: 65,536 steps took 10 ms."""
    from calibcast.calib.device_observer import _STEPS, _steps
    from calibcast.calib.hidden import Slices

    places = Slices(torch.empty(shape, device="meta").permute(order), list(reduced), False).in_memory()
    assert (_steps(places) <= _STEPS) is taken


def compiled(kernel, types, **constants):
    """For an H100, which need not be here: the interpreter takes what the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


TALLY = {
    "x_ptr": "*fp32", "values_ptr": "*fp32", "counts_ptr": "*i32", "sums_ptr": "*fp64", "bins_ptr": "*i64",
    "size": "i32", "row": "i32", "mask_at_most": "fp32", "width": "i32", "step": "i32", "pitch": "i32",
}  # fmt: skip


@pytest.mark.parametrize("gaps", [0, 1, 2])
@pytest.mark.parametrize("histogram", [False, True])
def test_the_kernel_compiles_and_reads_four_elements_at_a_time_where_they_lie_so(gaps, histogram):
    pytest.importorskip("triton")
    from calibcast.calib.triton_kernel import tally

    made = compiled(tally, TALLY, GAPS=gaps, MASKED=False, HISTOGRAM=histogram, PLACES=396, BLOCK=1024)
    assert ("ld.global.v4" in made.asm["ptx"]) == (gaps < 2)


@pytest.mark.parametrize(("dtype", "masked"), [("*fp16", False), ("*bf16", False), ("*fp32", True)])
def test_the_kernel_compiles_for_half_precision_and_masks(dtype, masked):
    pytest.importorskip("triton")
    from calibcast.calib.triton_kernel import tally

    types = {**TALLY, "x_ptr": dtype}
    assert compiled(tally, types, GAPS=0, MASKED=masked, HISTOGRAM=True, PLACES=396, BLOCK=1024).asm["cubin"]


@pytest.mark.parametrize(
    ("squares", "spread", "adjacent", "rows", "columns"),
    [(True, 2, True, 4, 1024), (True, 1, False, 1024, 1), (False, 0, True, 1, 1024), (True, 0, True, 64, 64)],
)
def test_the_kernel_of_sums_compiles(squares, spread, adjacent, rows, columns):
    pytest.importorskip("triton")
    from calibcast.calib.triton_slices import sum_slices

    whole = dict.fromkeys(("place", "slices", "length", "apart", "width", "step", "pitch"), "i32")
    constants = {"SQUARES": squares, "SPREAD": spread, "ADJACENT": adjacent, "ROWS": rows, "COLUMNS": columns}
    assert compiled(sum_slices, {"x_ptr": "*fp32", "found_ptr": "*i64", **whole}, **constants).asm["cubin"]


def test_the_kernel_that_gathers_compiles():
    pytest.importorskip("triton")
    from calibcast.calib.triton_gather import gather

    types = {name: "*i64" for name in gather.arg_names if name.endswith("_ptr")}
    types |= {"values_ptr": "*fp32", "counts_ptr": "*i32", "sums_ptr": "*fp64", "measured": "i64"}
    types |= {"to_values_ptr": "*fp64", "to_hidden_ptr": "*fp64"}
    assert compiled(gather, types, PLACES=396, LANES=512, HISTOGRAM=True, BLOCK=1024).asm["cubin"]


@pytest.mark.parametrize(
    ("dtype", "exact", "grad"), [("*fp32", True, True), ("*fp16", True, False), ("*fp32", False, False)]
)
def test_the_kernel_of_errors_compiles(dtype, exact, grad):
    pytest.importorskip("triton")
    from calibcast.calib.triton_errors import sum_errors

    types = {
        "made_ptr": dtype,
        "exact_ptr": dtype,
        "grad_ptr": "*fp32",
        "sums_ptr": "*fp64",
        "size": "i32",
        "row": "i32",
    }
    assert compiled(sum_errors, types, EXACT=exact, GRAD=grad, PLACES=256, BLOCK=1024).asm["cubin"]


def test_a_kernel_that_does_not_work_is_not_used(monkeypatch, caplog):
    """As where Triton has no driver or compiler: then torch sums, and it is said once."""
    pytest.importorskip("triton")
    from calibcast.calib import rounding_sums

    monkeypatch.setattr(rounding_sums, "_launch", lambda *arguments: None)  # sums nothing, so that all sums are 0
    rounding_sums.kernel_for.cache_clear()
    values = torch.ones(3)
    with caplog.at_level("INFO", "calibcast"):
        assert [rounding_sums.ErrorSums(values.device).of(values, None, None) for _ in range(2)] == [None, None]
    assert [r.getMessage() for r in caplog.records if "summed by torch" in r.getMessage()] == [
        "errors are summed by torch, which is slower: RuntimeError: it sums the errors of [1.5, inf, 2] as "
        "[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]"
    ]
    rounding_sums.kernel_for.cache_clear()
