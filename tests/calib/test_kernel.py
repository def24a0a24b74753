"""The kernels against a naive float64 reference, and against each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from calibcast.calib import kernel
from calibcast.calib.graph import TensorSpec
from calibcast.calib.kernel import ExponentCounter, HostKernel, measure_on_device
from calibcast.calib.memory_layout import is_dense
from calibcast.calib.observer import Observer
from calibcast.calib.statistic_names import BINS, COUNTS, VALUES
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Where each bin of the histogram begins: 2^-126 is the smallest magnitude of bin 1, 2^127 that of bin 254.
EDGES = torch.tensor([2.0**exponent for exponent in range(-126, 128)], dtype=torch.float64)

Numbers = tuple[dict[str, float], dict[str, int], torch.Tensor | None]


def reference(tensor: torch.Tensor) -> Numbers:
    """Every statistic written down from its definition, in float64."""
    x = tensor.double().flatten()
    finite = x[torch.isfinite(x)]
    nonzero = finite[finite != 0].abs()
    values = {
        "min": min(finite.tolist(), default=math.inf),
        "max": max(finite.tolist(), default=-math.inf),
        "smallest": min(nonzero.tolist(), default=math.inf),
        "sum": math.fsum(finite.tolist()),
        "sum_of_squares": math.fsum((finite * finite).tolist()),
    }
    counts = {
        "elements": x.numel(),
        "nan": int((x != x).sum()),
        "posinf": int((x == math.inf).sum()),
        "neginf": int((x == -math.inf).sum()),
        "zeros": finite.numel() - nonzero.numel(),
        "masked": 0,
    }
    bins = torch.bucketize(finite.abs(), EDGES, right=True).tolist() + [BINS - 1] * (x.numel() - finite.numel())
    return values, counts, torch.tensor([bins.count(i) for i in range(BINS)])


def on_host(tensor: torch.Tensor, histogram: bool = True) -> Numbers:
    tally = HostKernel(histogram).measure(tensor)
    return dict(zip(VALUES, tally.values, strict=True)), dict(zip(COUNTS, tally.counts, strict=True)), tally.histogram


def on_device(tensor: torch.Tensor, histogram: bool = True) -> Numbers:
    values, counts, bins, _ = measure_on_device(tensor, histogram)
    assert values.dtype == torch.float64
    assert counts.dtype == torch.int64
    named = dict(zip(VALUES, values.tolist(), strict=True))
    return named, dict(zip(COUNTS, counts.tolist(), strict=True)), None if bins is None else bins.cpu()


def among_others(tensor: torch.Tensor, histogram: bool = True) -> Numbers:
    """As an observer measures it: small tensors many at a time, here between two others."""
    names = ["before", "x", "after"]
    observer = Observer([spec(name) for name in names], torch.device("cpu"), histogram)
    observer.start(0)
    for name, other in zip(names, [noise(9), tensor, noise(300).relu()], strict=True):
        observer.measure(name, other)
    observer.finish()
    total = observer.total
    values, counts = total.values[1].tolist(), total.counts[1].tolist()
    bins = None if total.histograms is None else total.histograms[1]
    return dict(zip(VALUES, values, strict=True)), dict(zip(COUNTS, counts, strict=True)), bins


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, 0, "", "", "", "activation", "float32", ())


KERNELS = [on_host, on_device, among_others]


def assert_same(found: Numbers, expected: Numbers, tensor: torch.Tensor) -> None:
    """Counts, extremes and histogram are exact; a sum is good to 1e-5 of the sum of what was added."""
    values, counts, bins = found
    wanted, wanted_counts, wanted_bins = expected
    assert counts == wanted_counts
    for name in ("min", "max", "smallest"):
        assert values[name] == wanted[name], name
    finite = tensor.double().flatten()
    added = float(finite[torch.isfinite(finite)].abs().sum())
    assert values["sum"] == pytest.approx(wanted["sum"], rel=1e-5, abs=1e-5 * added)
    assert values["sum_of_squares"] == pytest.approx(wanted["sum_of_squares"], rel=1e-5)
    if bins is not None and wanted_bins is not None:
        assert torch.equal(bins, wanted_bins)


def variance(numbers: Numbers) -> float:
    """rms squared minus mean squared."""
    count = numbers[1]["elements"]
    return numbers[0]["sum_of_squares"] / count - (numbers[0]["sum"] / count) ** 2


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of seven elements, so that small tensors take many."""
    monkeypatch.setattr(kernel, "_HOST_STEP", 7)
    monkeypatch.setattr(kernel, "_DEVICE_STEP", 7)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(*values: float) -> torch.Tensor:
    """Noise with some special values strewn in."""
    x = noise(60)
    x[5 : 5 + 7 * len(values) : 7] = torch.tensor(values)
    return x


CONTENTS = {
    "noise": noise(60),
    "positive": noise(60).abs() + 0.5,
    "negative": -noise(60).abs() - 0.5,
    "sparse": noise(60).relu(),
    "only zeros": torch.zeros(60),
    "only negative zeros": -torch.zeros(60),
    "both zeros": with_values(0.0, -0.0, 0.0),
    "constant": torch.full((60,), 0.3),
    "constant, negative": torch.full((60,), -7.0),
    "one element off a constant": torch.cat([torch.full((59,), 0.3), torch.tensor([0.30000003])]),
    "nan": with_values(math.nan, math.nan),
    "infinities": with_values(math.inf, -math.inf, -math.inf),
    "everything at once": with_values(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-42, 3e38),
    "only nan": torch.full((60,), math.nan),
    "only nonfinite": torch.tensor([math.inf, -math.inf, math.nan] * 20),
    "subnormal": torch.tensor([1e-40, -3e-41, 2e-45, 0.0] * 15),
    "smallest normal": torch.tensor([2.0**-126, -(2.0**-126), 2.0**-127] * 20),
    "largest": torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1.0] * 20),
    "huge": noise(60) * 1e30,
    "tiny": noise(60) * 1e-30,
    "powers of two": torch.tensor([2.0**e for e in range(-60, 60, 2)]),
    "below powers of two": torch.tensor([math.nextafter(2.0**e, 0) for e in range(-60, 60, 2)]),
}

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda x: x,
    "0-d": lambda x: x[5],
    "one element": lambda x: x[5:6].view(1, 1),
    "empty": lambda x: x[:0].view(0, 3),
    "contiguous": lambda x: x.view(3, 4, 5),
    "permuted": lambda x: x.view(3, 4, 5).permute(2, 0, 1),
    "channels last": lambda x: x.view(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "offset": lambda x: x[7:47],
    "every second": lambda x: x[::2],
    "strided columns": lambda x: x.view(6, 10)[:, 1:9:3],
    "strided rows": lambda x: x.view(3, 4, 5)[::2, 1:, ::2],
    "expanded": lambda x: x.view(1, 60).expand(4, 60),
    "expanded inside": lambda x: x.view(10, 1, 6).expand(10, 3, 6),
    "expanded and strided": lambda x: x.view(6, 1, 10)[:, :, ::3].expand(6, 5, 4),
    "expanded from one": lambda x: x[5].expand(3, 4),
    "overlapping windows": lambda x: x.unfold(0, 5, 2),
}


@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_kernels_match_the_definitions_for_every_content(
    content: str, dtype: torch.dtype, measure: Callable[..., Numbers]
) -> None:
    """Whatever the values and the width, the numbers are those of the definitions on the exactly widened tensor."""
    tensor = CONTENTS[content].to(dtype)
    assert_same(measure(tensor), reference(tensor), tensor)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("content", ["noise", "sparse", "everything at once"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_match_the_definitions_for_every_layout(
    layout: str, content: str, dtype: torch.dtype, measure: Callable[..., Numbers]
) -> None:
    """Strides do not matter, and each element counts as often as it shows: also over many small steps."""
    tensor = LAYOUTS[layout](CONTENTS[content].to(dtype))
    assert_same(measure(tensor), reference(tensor), tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("measure", KERNELS)
def test_float8_is_measured_as_what_it_holds(measure: Callable[..., Numbers], dtype: torch.dtype) -> None:
    """A dtype without operators of its own is widened first, on the device too."""
    tensor = CONTENTS["noise"].to(dtype)
    assert_same(measure(tensor), reference(tensor), tensor)


@pytest.mark.parametrize("measure", KERNELS)
def test_lazily_negated_view_is_measured_by_its_values(measure: Callable[..., Numbers]) -> None:
    """The imaginary part of a conjugate is the stored one negated, although its bits are not."""
    tensor = torch.complex(noise(40), noise(40, seed=1).abs() + 1).conj().imag
    assert tensor.is_neg()
    assert measure(tensor)[0]["max"] < 0
    assert_same(measure(tensor), reference(tensor.resolve_neg()), tensor.resolve_neg())


def shaped(values: list[float], layout: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.tensor(values, dtype=dtype)
    if layout == 0:
        return x
    if layout == 1:
        return x[::2]
    if layout == 2:
        return x.view(-1, 1).expand(-1, 3)
    return x[: x.numel() // 2 * 2].view(2, -1).t()


single = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
clustered = st.builds(lambda middle, offset: middle * (1 + offset), st.just(417.5), st.floats(-1e-3, 1e-3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(single, max_size=40) | st.lists(clustered, min_size=1, max_size=40),
    layout=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    step=st.integers(1, 50),
)
def test_any_tensor_gives_what_the_definitions_give(
    values: list[float], layout: int, dtype: torch.dtype, step: int
) -> None:
    """Over arbitrary floats, layouts, widths and step sizes, both kernels agree with the definitions."""
    tensor = shaped(values, layout, dtype)
    expected = reference(tensor)
    with mock.patch.object(kernel, "_HOST_STEP", step), mock.patch.object(kernel, "_DEVICE_STEP", step):
        for measure in KERNELS:
            assert_same(measure(tensor), expected, tensor)


@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("content", CONTENTS)
def test_histogram_counts_every_element_once(content: str, measure: Callable[..., Numbers]) -> None:
    """The bins of a histogram add up to the number of elements, nonfinite ones in the last bin."""
    _, counts, bins = measure(CONTENTS[content].view(6, 10).expand(3, 6, 10))
    assert bins is not None
    assert int(bins.sum()) == counts["elements"] == 180
    assert int(bins[BINS - 1]) == counts["nan"] + counts["posinf"] + counts["neginf"]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("content", CONTENTS)
def test_without_histogram_the_other_numbers_are_the_same(content: str, measure: Callable[..., Numbers]) -> None:
    """Counting exponents is a bystander: leaving it out changes no other number."""
    values, counts, bins = measure(CONTENTS[content], histogram=False)
    full_values, full_counts, _ = measure(CONTENTS[content])
    assert bins is None
    assert values == full_values
    assert counts == full_counts


@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("step", [64, 1 << 19])
def test_offset_data_keep_their_variance(
    measure: Callable[..., Numbers], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data between 400.05 and 400.10, whose variance is 4e-9 of its square, keep that variance to 1%."""
    monkeypatch.setattr(kernel, "_HOST_STEP", step)
    monkeypatch.setattr(kernel, "_DEVICE_STEP", step)
    for tensor in (torch.tensor([400.05, 400.10] * 2000), 400.05 + 0.05 * torch.rand(4000), -400 - noise(4000) / 9):
        exact = float(tensor.double().var(correction=0))
        assert variance(measure(tensor)) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("measure", KERNELS)
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e14, 1.0, 1e-14, 1e-18, 1e-30])
def test_squares_neither_overflow_nor_vanish(measure: Callable[..., Numbers], scale: float) -> None:
    """The sum of squares is accurate at magnitudes whose squares fp32 cannot hold."""
    tensor = noise(5000) * scale
    squares = math.fsum((tensor.double() ** 2).tolist())
    found = measure(tensor)
    assert found[0]["sum_of_squares"] == pytest.approx(squares, rel=1e-5)
    assert variance(found) == pytest.approx(float(tensor.double().var(correction=0)), rel=1e-3)


@pytest.mark.parametrize("measure", KERNELS)
def test_float64_beyond_fp32_counts_in_the_outermost_bins(measure: Callable[..., Numbers]) -> None:
    """float64 magnitudes that fp32 has not keep exact extremes, and count as its largest or smallest bin."""
    values, counts, bins = measure(torch.tensor([1e200, -1e-200, 1.0], dtype=torch.float64))
    assert bins is not None
    assert (values["max"], values["smallest"], counts["posinf"]) == (1e200, 1e-200, 0)
    assert {i: int(n) for i, n in enumerate(bins) if n} == {0: 1, 127: 1, BINS - 2: 1}


@pytest.mark.parametrize("content", ["noise", "sparse"])
@pytest.mark.parametrize("count", [1 << 18, (1 << 19) + 3, (1 << 20) + 1])
def test_large_tensors_match_the_device_kernel(content: str, count: int) -> None:
    """At the real step sizes, where exponents are counted in pairs, both kernels still agree."""
    tensor = noise(count) if content == "noise" else noise(count).relu()
    values, counts, bins = on_host(tensor)
    other_values, other_counts, other_bins = on_device(tensor)
    assert bins is not None
    assert other_bins is not None
    assert counts == other_counts
    assert torch.equal(bins, other_bins)
    for name in ("min", "max", "smallest"):
        assert values[name] == other_values[name]
    assert values["sum_of_squares"] == pytest.approx(other_values["sum_of_squares"], rel=1e-5)
    assert values["sum"] == pytest.approx(other_values["sum"], abs=1e-5 * count)


def test_a_kernel_remembers_nothing_between_tensors() -> None:
    """Scratch memory is reused; what it held before does not reach the next result."""
    one = HostKernel(histogram=True)
    for content in CONTENTS.values():
        fresh, reused = HostKernel(histogram=True).measure(content), one.measure(content)
        assert reused.values == fresh.values
        assert reused.counts == fresh.counts
        assert reused.histogram is not None
        assert fresh.histogram is not None
        assert torch.equal(reused.histogram, fresh.histogram)


def test_measuring_changes_nothing_and_keeps_no_gradient() -> None:
    """A measured tensor is bit for bit what it was, and its statistics carry no graph."""
    tensor = CONTENTS["everything at once"].clone().requires_grad_()
    before = tensor.detach().clone().view(torch.int32)
    on_host(tensor)
    values, *_ = measure_on_device(tensor, True)
    assert not values.requires_grad
    assert torch.equal(tensor.detach().view(torch.int32), before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chunks=st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=8), capacity=st.sampled_from([30, 32, 64]))
def test_exponents_counted_in_pairs_are_counted_right(chunks: list[list[int]], capacity: int) -> None:
    """Pairs of neighbours, an odd one left over and an overflowing buffer give the plain histogram."""
    with mock.patch.multiple(ExponentCounter, _CAPACITY=capacity, _PAIRS_FROM=4):
        counter = ExponentCounter()
        for chunk in chunks:
            counter.add(torch.tensor(chunk, dtype=torch.int32))
        found = counter.take()
    every = [exponent for chunk in chunks for exponent in chunk]
    assert found.tolist() == [every.count(i) for i in range(BINS)]
    assert int(counter.take().sum()) == 0


@pytest.mark.parametrize("count", [(1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 19])
def test_pairs_at_their_real_threshold(count: int) -> None:
    """Around a quarter of a million elements, where pairs begin to pay, the histogram is the plain one."""
    exponents = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    counter = ExponentCounter()
    counter.add(exponents)
    expected = torch.zeros(BINS, dtype=torch.int64).scatter_add_(0, exponents.long(), torch.ones(count).long())
    assert torch.equal(counter.take(), expected)


def test_buffer_of_exponents_may_fill_many_times() -> None:
    """More exponents than the buffer holds are counted as they overflow it."""
    counter = ExponentCounter()
    for value in range(6):
        counter.add(torch.full((1 << 19,), value, dtype=torch.int32))
    assert counter.take()[:7].tolist() == [1 << 19] * 6 + [0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_means_one_block_of_memory(layout: str) -> None:
    """`is_dense` holds where the elements lie in one gapless block, each once."""
    tensor = LAYOUTS[layout](torch.arange(60.0))
    places = {
        sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*map(range, tensor.shape))
    }
    assert is_dense(tensor) == (places == set(range(tensor.numel())))
