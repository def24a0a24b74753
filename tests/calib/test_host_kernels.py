"""A cast program on a host: what torch's CPU lacks in half precision, or has wrong, runs in fp32 and is rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.host_kernels import call_anywhere
from calibcast.engines.building import build
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.comparison import compare
from torch import fx, nn
from torch.nn.functional import avg_pool3d, grid_sample, interpolate, local_response_norm
from torch.utils import _pytree as pytree

SMOOTH = {4: "bicubic", 5: "trilinear"}
SIDE = 224  # from 192 pixels on, torch's half-precision grid_sampler gives NaN


def _grid(x: torch.Tensor) -> torch.Tensor:
    """Coordinates from -1.05 to 1.05, row by row: some lie outside of the image."""
    n = x.shape[-1]
    line = torch.linspace(-1.05, 1.05, n)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None] + x.mean() * 0


CALLS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "antialiased bilinear": (
        lambda x: interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
        (1, 2, 32, 32),
    ),
    "antialiased bicubic": (lambda x: interpolate(x, size=(9, 11), mode="bicubic", antialias=True), (1, 2, 32, 32)),
    "avg_pool3d": (lambda x: avg_pool3d(x, 2), (1, 2, 8, 8, 8)),
    "local_response_norm": (lambda x: local_response_norm(x, 3), (1, 6, 8, 8)),
    "grid_sample bilinear": (lambda x: grid_sample(x, _grid(x), align_corners=False), (1, 2, SIDE, SIDE)),
    "grid_sample nearest": (
        lambda x: grid_sample(x, _grid(x), mode="nearest", padding_mode="border", align_corners=True),
        (1, 2, SIDE, SIDE),
    ),
    "grid_sample bicubic": (
        lambda x: grid_sample(x, _grid(x), mode="bicubic", padding_mode="reflection", align_corners=True),
        (1, 2, SIDE, SIDE),
    ),
}


class Rounding(fx.Interpreter):
    """Each operator in fp32, its result rounded to the type that the graph gives it: the arithmetic in other words."""

    def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
        dtypes = [t.dtype for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not isinstance(target, torch._ops.OpOverload) or "_to_copy" in str(target) or not dtypes:
            return target(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtypes[0]), target(*args, **kwargs))


class Between(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.scale = body, nn.Parameter(torch.tensor(0.75))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x * self.scale) * self.scale


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_whatever_runs_a_cast_program_on_a_host_is_right(name: str, low: torch.dtype) -> None:
    """The module, a copy of it, the eager engine and `compare`: all run, and are as near as rounding allows."""
    body, shape = CALLS[name]
    torch.manual_seed(0)
    # Smooth, as coordinates are rounded: on noise, a step aside is another value.
    x = interpolate(torch.rand(*shape[:2], *(3,) * len(shape[2:])), shape[2:], mode=SMOOTH[len(shape)])
    program = torch.export.export(Between(body).eval(), (x,))
    plan = classify(program, calibrate(program, [x], progress=False), low_precision_type=low, nodes_to_include={"^.*$"})
    assert not plan.high_precision_nodes
    mixed = insert_casts(program, plan)
    module = mixed.module()
    with torch.no_grad():
        expected = Rounding(module).run(x)
        results = [module(x), copy.deepcopy(module)(x), build(mixed, plan, backend="eager")(x)]
    assert torch.isfinite(expected).all()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    frame = compare(program, mixed, [x], progress=False).frame
    assert frame["nonfinite_alone"].sum() == 0
    assert frame["sqnr_db"].min() > (30 if low == torch.float16 else 15)


def test_what_is_emulated_is_the_fp32_result_rounded() -> None:
    """Of a wrong kernel and of a missing one; what the host can do is left to it, in-place operators, too."""
    x = torch.rand(1, 2, SIDE, SIDE).half()
    grid = (torch.rand(1, SIDE, SIDE, 2) * 2 - 1).half()
    sampled = call_anywhere(torch.ops.aten.grid_sampler.default, (x, grid, 0, 0, False), {})
    wanted = torch.ops.aten.grid_sampler.default(x.float(), grid.float(), 0, 0, False).half()
    assert torch.equal(sampled, wanted)
    cube = torch.rand(1, 1, 4, 4, 4).bfloat16()
    pooled = call_anywhere(torch.ops.aten.avg_pool3d.default, (cube, [2, 2, 2]), {})
    assert torch.equal(pooled, torch.ops.aten.avg_pool3d.default(cube.float(), [2, 2, 2]).bfloat16())
    y = torch.rand(4).half()
    assert call_anywhere(torch.ops.aten.add_.Tensor, (y, y), {}) is y
    with pytest.raises(RuntimeError, match="shapes"):
        call_anywhere(torch.ops.aten.mm.default, (torch.ones(2, 3).half(), torch.ones(2, 3).half()), {})
