"""Holds the fused kernels to the host's.

Run on the CPU with TRITON_INTERPRET=1, which Triton reads when imported; or, with the argument `cuda`, on a GPU.
"""

import math
import sys

import torch
from calibcast.calib import device_observer
from calibcast.calib.captured_execution import captured_or_plain
from calibcast.calib.device_observer import DeviceObserver
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.graph import TensorSpec, tensor_specs
from calibcast.calib.observer import Observer
from calibcast.calib.rounding_sums import NUMBERS, ErrorSums, sums_of

CPU = torch.device("cpu")
DEVICE = torch.device(*sys.argv[1:] or ["cpu"])
INF, NAN = math.inf, math.nan
TENSORS = {
    "plain": torch.randn(700),
    "common": torch.randn(128 * 7).relu(),
    "common, then odd": torch.cat([torch.randn(128 * 3), torch.tensor([1e-30, -0.0, NAN, 1e20]), torch.randn(300)]),
    "edges": torch.tensor([2.0**-47, 2.0**-48, 2.0**16, 2.0**17, -(2.0**-47), 0.0, 2.0**17 - 0.01] * 40),
    "negative": -torch.rand(5, 7) - 1,
    "one": torch.tensor([3.5]),
    "zero-dim": torch.tensor(-2.0),
    "zeros": torch.zeros(130),
    "signed zeros": torch.tensor([0.0, -0.0, 1.0]),
    "nonfinite": torch.tensor([NAN, INF, -INF, 1.0, -2.0]),
    "all nan": torch.full((3,), NAN),
    "subnormal": torch.tensor([1e-40, 2e-39, -1e-41, 5.0]),
    "tiles": torch.randn(512 * 7 + 77),
    "tiles of ReLU": torch.randn(512 * 7).relu(),
    "tiles, one odd": torch.cat([torch.randn(512 * 4), torch.tensor([1e-30, -0.0, NAN, 1e20]), torch.randn(2000)]),
    "tiles of tiny": torch.randn(512 * 4) * 1e-22,
    "tiles of huge": torch.randn(512 * 4) * 1e25,
    "tiles with Inf": torch.randn(512 * 4).index_fill(0, torch.tensor([700, 1900]), -INF),
    "tiles of zeros": torch.zeros(512 * 4),
    "tiles of half": torch.randn(512 * 5 + 3).half(),
    "tiles, masked": torch.where(torch.rand(512 * 4) < 0.3, -INF, torch.randn(512 * 4)),
    "huge": torch.tensor([1e38, -3e38, 1e-38]),
    "half": torch.randn(300).half(),
    "bfloat16": torch.randn(300).bfloat16(),
    "permuted": torch.randn(6, 7, 8).permute(2, 0, 1),
    "chunk": torch.randn(6, 4, 512)[:, 1:3],
    "narrow": torch.randn(40, 96)[:, 32:64],
    "queries": torch.randn(2, 30, 3, 4, 16).permute(2, 0, 3, 1, 4)[1],
    "three strides": torch.randn(6, 9, 9)[:, ::2, ::2],
    "windows": torch.randn(900).unfold(0, 9, 3),
    "gaps": torch.randn(10, 10)[:, ::2],
    "expanded": torch.randn(4, 1).expand(4, 9),
    "double": torch.randn(40).double(),
    "exact block": torch.randn(128 * 3),
    "masked": torch.tensor([-1e9, 0.5, -INF, -3e38, 2.0, NAN, INF, 0.0]),
    "all masked": torch.full((5,), -INF),
}


class Views(torch.nn.Module):
    """Tensors that share their elements, and operators with hidden sums."""

    def forward(self, x):
        y = torch.relu(x).view(4, 6)
        a, b = y.permute(1, 0).chunk(2)
        return a.reshape(-1) * 2, b + y.mean(), torch.nn.functional.layer_norm(y, (6,))


class Sums(torch.nn.Module):
    """Operators that sum inside, along dimensions that lie together in memory and along others."""

    def forward(self, x):
        y = x.view(2, 4, 3, 5)
        f = torch.nn.functional
        sums = [x.sum(), y.mean(1), y.sum((0, 2)), y.mean((2, 3)), y.sum(-1), y[:, :, 0].mean(1), x.double().sum()]
        norms = [f.layer_norm(y, (3, 5)), f.rms_norm(y, (5,)), f.group_norm(y, 2), y.var(1), y.norm(dim=(1, 3))]
        permuted = f.layer_norm(y.permute(0, 2, 3, 1), (4,))
        q, k, v = (t.permute(0, 2, 1, 3) for t in (y, y * 2, y + 1))
        return sums, norms, permuted, f.scaled_dot_product_attention(q, k, v), f.avg_pool2d(y, 2)


def compare(ours, theirs, names):
    """Counts, histograms and extremes are equal; sums are within fp32 rounding, in which the host forms them."""
    ours, theirs = ours.to(CPU), theirs.to(CPU)
    for array in ("counts", "histograms", "batches", "absmax_batch", "nonfinite_batch"):
        mine, reference = getattr(ours, array), getattr(theirs, array)
        if reference is not None:
            for row, name in enumerate(names):
                assert torch.equal(mine[row], reference[row]), (array, name, mine[row], reference[row])
    assert torch.equal(ours.values[:, :3], theirs.values[:, :3])
    scale = theirs.values[:, :2].abs().amax(1).clamp(1e-30, 1e30)  # of sums that cancel out
    torch.testing.assert_close(ours.values[:, 3] / scale, theirs.values[:, 3] / scale, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.values[:, 4], theirs.values[:, 4], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-9)


def compare_tensors(tensors, histogram):
    masks = frozenset(name for name in tensors if "masked" in name)
    specs = [TensorSpec(name, 0, "", "", "", "activation", "float32", ()) for name in tensors]
    totals = []
    for kind, device in ((DeviceObserver, DEVICE), (Observer, CPU)):
        observer = kind(specs, device, histogram, masks)
        for batch in range(2):
            observer.start(batch)
            for name, tensor in tensors.items():
                observer.measure(name, on(device, tensor))
            observer.finish()
        totals.append(observer.total)
    compare(*totals, tensors)


def on(device, tensor):
    """With its strides: `to` would fill an expanded tensor and one with gaps."""
    if device == CPU:
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype, device=device).set_(tensor.untyped_storage().cuda())
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def compare_runs(model, size):
    program = torch.export.export(model, (torch.randn(size),))
    specs = tensor_specs(program)
    totals = []
    for kind in (DeviceObserver, Observer):  # on one device: operators round in their own way on another
        observer = kind(specs, DEVICE, True)
        step = captured_or_plain(ProgramRunner(program, DEVICE), observer)
        for batch in range(3):
            step([torch.linspace(-1, 2, size) * (batch + 1)], batch, observer.watch)
            assert observer.first_nonfinite() is None
            observer.finish()
        totals.append(observer.total)
        if kind is DeviceObserver and isinstance(model, Views):
            assert len(observer.layout.equals) >= 2, "views are measured once"
    compare(*totals, [spec.node for spec in specs])


def compare_errors(size):
    """`ErrorSums` against `sums_of`: plain errors, lost elements, what was not finite before, layouts, half types."""
    exact = torch.randn(3, 5, size)
    made, grad = exact.half().float(), torch.randn(3, 5, size)
    lost, odd = made.clone(), exact.clone()
    lost[0, 0, :3], odd[1, 1, :4] = torch.tensor([NAN, INF, -INF]), torch.tensor([NAN, INF, -INF, 3e38])
    lost[1, 1, 3] = -3e38  # its error squared is beyond fp32
    cases = [
        (made, exact, grad), (made, exact, None), (exact, None, None), (odd, None, grad), (lost, odd, grad),
        tuple(t.permute(2, 0, 1) for t in (made, exact, grad)), (made.half(), exact.bfloat16(), grad),
    ]  # fmt: skip
    sums = ErrorSums(on(DEVICE, exact).device)
    rows = [sums.of(*(t if t is None else on(DEVICE, t) for t in case)) for case in cases]
    assert [row.place for row in rows] == list(range(len(cases)))
    found = sums.added_up().reshape(-1, NUMBERS).to(CPU)[: len(cases)]
    torch.testing.assert_close(found, torch.stack([sums_of(*case) for case in cases]), rtol=1e-6, atol=0)
    gaps = on(DEVICE, exact)[:, :, ::2]
    assert sums.of(gaps, gaps, None) is sums.of(on(DEVICE, exact), on(DEVICE, exact.transpose(0, 1)), None) is None


def large():
    """Tensors of many tiles for each program: for a GPU."""
    odd = torch.tensor([1e-30, -0.0, NAN, 1e20, INF, -INF])
    return {
        "large": torch.randn(3_000_003),
        "large, odd": torch.cat([torch.randn(2_000_000), odd, torch.randn(1_000_000)]),
        "large, tiny": torch.randn(2_000_000) * 1e-22,
        "large, masked": torch.where(torch.rand(2_000_000) < 0.3, -INF, torch.randn(2_000_000)),
        "large, half": torch.randn(2_000_001).half(),
    }


if __name__ == "__main__":
    device_observer._try_out(DEVICE, True)
    blocks = [(128, 3)]  # several steps of several programs
    if DEVICE != CPU:
        blocks.append((device_observer.BLOCK, device_observer.PROGRAMS))
        TENSORS |= large()
    for device_observer.BLOCK, device_observer.PROGRAMS in blocks:
        compare_tensors(TENSORS, histogram=True)
        compare_tensors(TENSORS, histogram=False)
        compare_runs(Views(), 24)
        compare_runs(Sums(), 120)
    for size in (5, 300, 40_000) if DEVICE != CPU else (5, 300):
        compare_errors(size)
    print("same")
