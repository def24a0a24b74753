"""From what a dataloader gives to the inputs of a program: every form that is taken, every misfit that is named."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from calibcast.calib import BatchError, CalibcastError, RangeTable, calibrate
from calibcast.calib.batches import signature_of
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(program: ExportedProgram, batches: Any, **options: Any) -> RangeTable:
    return calibrate(program, batches, progress=False, **options)


class Pair(nn.Module):
    """Two inputs, told apart by what becomes of them."""

    def forward(self, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ids * 10 + weight


class Single(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Keywords(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x * scale + (0 if bias is None else bias)


class Nested(nn.Module):
    def forward(self, features: dict[str, Any]) -> torch.Tensor:
        return features["image"] * 2 + features["text"]["mask"] - features["boxes"][1]


class Options(nn.Module):
    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, flag: bool = True, power: int = 2
    ) -> torch.Tensor:
        y = x**power if flag else x
        return y if mask is None else y * mask


class Sequence(nn.Module):
    def forward(self, items: list[torch.Tensor]) -> torch.Tensor:
        return items[0] * 10 + items[1]


IDS, WEIGHT = noise(3), noise(3, seed=1)
X, SCALE, BIAS = noise(4), noise(4, seed=2), noise(4, seed=3)


@pytest.fixture(scope="module")
def pair() -> ExportedProgram:
    return torch.export.export(Pair(), (noise(3), noise(3)))


@pytest.fixture(scope="module")
def single() -> ExportedProgram:
    return torch.export.export(Single(), (noise(4),))


@pytest.fixture(scope="module")
def keywords() -> ExportedProgram:
    return torch.export.export(Keywords(), (noise(4),), {"bias": noise(4), "scale": noise(4)})


@pytest.fixture(scope="module")
def nested() -> ExportedProgram:
    features = {"image": noise(3), "text": {"mask": noise(3)}, "boxes": (noise(3), noise(3))}
    return torch.export.export(Nested(), (features,))


@pytest.fixture(scope="module")
def options() -> ExportedProgram:
    return torch.export.export(Options(), (noise(3), None, True, 2))


@pytest.fixture(scope="module")
def sequence() -> ExportedProgram:
    return torch.export.export(Sequence(), ([noise(3), noise(3)],))


@pytest.fixture(scope="module")
def dynamic() -> ExportedProgram:
    batch, length = Dim("batch", min=2, max=8), Dim("length", min=2, max=16)
    shapes = {"ids": {0: batch, 1: length}, "weight": {0: batch, 1: length}}
    return torch.export.export(Pair(), (noise(4, 6), noise(4, 6)), dynamic_shapes=shapes)


def assert_reads(program: ExportedProgram, batch: Any, *expected: torch.Tensor, **options: Any) -> None:
    """The batch means the expected flat inputs: as read, and as measured in the rows of the inputs."""
    transform = options.get("transform") or (lambda given: given)
    flat = [value for value in signature_of(program).flatten(transform(batch), 0) if isinstance(value, torch.Tensor)]
    assert len(flat) == len(expected)
    for found, wanted in zip(flat, expected, strict=True):
        assert found is wanted
    inputs = measured(program, [batch], **options).frame.filter(kind="input")
    assert inputs["max"].to_list() == [float(wanted.max()) for wanted in expected]


class Fields(NamedTuple):
    ids: torch.Tensor
    weight: torch.Tensor


PAIR_FORMS = {
    "tuple": (IDS, WEIGHT),
    "list": [IDS, WEIGHT],
    "dict": {"ids": IDS, "weight": WEIGHT},
    "dict in another order": {"weight": WEIGHT, "ids": IDS},
    "mapping that is no dict": collections.UserDict({"ids": IDS, "weight": WEIGHT}),
    "ordered dict": collections.OrderedDict(weight=WEIGHT, ids=IDS),
    "args and kwargs": ((IDS,), {"weight": WEIGHT}),
    "args alone": ((IDS, WEIGHT), {}),
    "kwargs alone": ((), {"ids": IDS, "weight": WEIGHT}),
    "namedtuple": Fields(IDS, WEIGHT),
}


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_two_inputs_in_every_form(form: str, pair: ExportedProgram) -> None:
    """Tuple, list, dict, any mapping, and `(args, kwargs)` all mean the same two inputs."""
    assert_reads(pair, PAIR_FORMS[form], IDS, WEIGHT)


SINGLE_FORMS = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "dict": {"x": X},
    "args and kwargs": ((X,), {}),
}


@pytest.mark.parametrize("form", SINGLE_FORMS)
def test_one_input_in_every_form(form: str, single: ExportedProgram) -> None:
    """A lone tensor may come bare or in any container."""
    assert_reads(single, SINGLE_FORMS[form], X)


@pytest.mark.parametrize(
    ("batch", "transform"),
    [
        ((X, "label"), lambda batch: batch[0]),
        ({"pixels": X, "label": 3}, lambda batch: {"x": batch["pixels"]}),
        ([1, 2], lambda batch: ((X,), {})),
        ("anything", lambda batch: (X,)),
        (X.numpy(), lambda batch: X),
    ],
)
def test_transform_reads_any_batch(batch: Any, transform: Callable[[Any], Any], single: ExportedProgram) -> None:
    """Whatever the dataloader gives, `transform` turns it into one of the forms."""
    assert_reads(single, batch, X, transform=transform)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "scale": SCALE, "bias": BIAS},
        {"scale": SCALE, "bias": BIAS, "x": X},
        ((X,), {"scale": SCALE, "bias": BIAS}),
        ((), {"x": X, "bias": BIAS, "scale": SCALE}),
    ],
    ids=["names", "names in another order", "position and names", "names as kwargs"],
)
def test_keyword_inputs_by_name_or_position(batch: Any, keywords: ExportedProgram) -> None:
    """An input of the model may be given by name or by position; keywords go by name, in any order."""
    read = dict(zip(signature_of(keywords).names, signature_of(keywords).flatten(batch, 0), strict=True))
    assert set(read) == {"x", "scale", "bias"}
    assert read["x"] is X
    assert read["scale"] is SCALE
    assert read["bias"] is BIAS
    table = measured(keywords, [batch])
    y = X * SCALE + BIAS
    assert table.frame.filter(node="add")["max"].to_list() == [float(y.max())]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda features: features,
        lambda features: (features,),
        lambda features: {"features": features},
        lambda features: ((features,), {}),
        lambda features: collections.UserDict(features),
        lambda features: {**features, "boxes": list(features["boxes"])},
        lambda features: {**features, "text": collections.UserDict(features["text"])},
        lambda features: dict(reversed(features.items())),
    ],
    ids=["bare", "tuple", "by name", "call", "mapping", "list for tuple", "mapping inside", "another order"],
)
def test_nested_inputs(wrap: Callable[[Any], Any], nested: ExportedProgram) -> None:
    """A dict of dicts and tuples is read by its keys, whatever collating has made of its containers."""
    image, mask, first, second = (noise(3, seed=seed) for seed in range(4))
    features = {"image": image, "text": {"mask": mask}, "boxes": (first, second)}
    assert_reads(nested, wrap(features), image, mask, first, second)


@pytest.mark.parametrize(
    "batch",
    [
        X[:3],
        (X[:3],),
        (X[:3], None),
        (X[:3], None, True, 2),
        {"x": X[:3], "flag": True},
        ((X[:3],), {"power": 2}),
    ],
    ids=["bare", "tuple", "none", "all", "by name", "call"],
)
def test_constants_of_the_export_may_be_left_out(batch: Any, options: ExportedProgram) -> None:
    """None, booleans and numbers that the export fixed need not be given, and may be."""
    table = measured(options, [batch])
    assert table.frame.filter(node="pow_1")["max"].to_list() == [float((X[:3] ** 2).max())]


@pytest.mark.parametrize(
    "batch",
    [[IDS, WEIGHT], (IDS, WEIGHT), ([IDS, WEIGHT],), {"items": (IDS, WEIGHT)}],
    ids=["list", "tuple", "inside a tuple", "by name"],
)
def test_one_input_that_is_a_sequence(batch: Any, sequence: ExportedProgram) -> None:
    """A program whose only input is a list takes the list itself as its batch, or a tuple around it."""
    assert_reads(sequence, batch, IDS, WEIGHT)


class TakesFields(nn.Module):
    def forward(self, fields: Fields) -> torch.Tensor:
        return fields.ids * 10 + fields.weight


@pytest.mark.parametrize(
    "batch",
    [Fields(IDS, WEIGHT), (Fields(IDS, WEIGHT),), {"fields": Fields(IDS, WEIGHT)}],
    ids=["bare", "tuple", "name"],
)
def test_namedtuple_inputs(batch: Any) -> None:
    """An input that is a namedtuple is read as the sequence that it is."""
    program = torch.export.export(TakesFields(), (Fields(noise(3), noise(3)),))
    assert_reads(program, batch, IDS, WEIGHT)


@dataclasses.dataclass
class Sample:
    ids: torch.Tensor
    weight: torch.Tensor


class TakesSample(nn.Module):
    def forward(self, sample: Sample) -> torch.Tensor:
        return sample.ids * 10 + sample.weight


def test_dataclass_inputs() -> None:
    """A registered dataclass is read by its fields, and another object in its place is refused."""
    torch.export.register_dataclass(Sample, serialized_type_name="tests.calib.Sample")
    program = torch.export.export(TakesSample(), (Sample(noise(3), noise(3)),))
    assert_reads(program, Sample(IDS, WEIGHT), IDS, WEIGHT)
    assert_reads(program, (Sample(IDS, WEIGHT),), IDS, WEIGHT)
    with pytest.raises(BatchError, match="batch 0, argument sample: expected a Sample, got Tensor"):
        measured(program, [(IDS,)])


class Variadic(nn.Module):
    def forward(self, first: torch.Tensor, *rest: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return first + sum(rest) * named["scale"]


def test_variadic_inputs() -> None:
    """Programs of `*args` and `**kwargs` are called as they were exported."""
    program = torch.export.export(Variadic(), (noise(3), noise(3)), {"scale": noise(3)})
    scale = noise(3, seed=5)
    assert_reads(program, ((IDS, WEIGHT), {"scale": scale}), IDS, WEIGHT, scale)


class Numbered(nn.Module):
    def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return x * count.item()


def test_number_read_from_data_has_no_bounds() -> None:
    """A program that reads a number out of a tensor has a symbol without bounds, and is calibrated like another."""
    program = torch.export.export(Numbered(), (noise(3), torch.tensor(4)))
    table = measured(program, [(IDS, torch.tensor(-2))])
    assert table.frame.filter(node="mul")["max"].to_list() == [float((IDS * -2).max())]


class Open(nn.Module):
    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x * count + torch.zeros(count)


@pytest.fixture(scope="module")
def open_count() -> ExportedProgram:
    shapes = {"x": {0: Dim.AUTO}, "count": Dim.DYNAMIC}
    return torch.export.export(Open(), (noise(3), 3), dynamic_shapes=shapes)


@pytest.mark.parametrize("count", [3, 5])
def test_integer_that_the_export_left_open(count: int, open_count: ExportedProgram) -> None:
    """A dynamic integer is an input like a size: any value that agrees with the tensors is taken."""
    x = noise(count)
    table = measured(open_count, [(x, count)])
    assert table.frame.filter(node="mul")["max"].to_list() == [float((x * count).max())]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, 5), r"argument count: expected an int x\[0\], got 5: it is 5, but x\[0\] is 4 in this batch"),
        ((X, 4.0), r"argument count: expected an int x\[0\], got a float"),
        ((X, torch.tensor(4)), r"argument count: expected an int x\[0\], got a Tensor"),
        ((X,), r"input 'count' is missing; the program takes \(x: float32\[x\[0\]\], count: an int x\[0\]\)"),
    ],
    ids=["another size", "float", "tensor", "missing"],
)
def test_integer_that_the_export_left_open_is_checked(batch: Any, message: str, open_count: ExportedProgram) -> None:
    """A dynamic integer that is none, is missing, or disagrees with a size is named."""
    with pytest.raises(BatchError, match=message):
        measured(open_count, [batch])


MISFITS: dict[str, tuple[Any, str]] = {
    "one too many": (
        (IDS, WEIGHT, IDS),
        r"batch 0: got 3 inputs, but the program takes 2 by position: \(ids: float32\[3\]",
    ),
    "one too few": ((IDS,), r"batch 0: input 'weight' is missing; the program takes \(ids: float32\[3\], weight"),
    "bare tensor": (IDS, "input 'weight' is missing"),
    "missing key": ({"ids": IDS}, "batch 0: input 'weight' is missing"),
    "empty dict": ({}, "input 'ids' is missing"),
    "unknown key": ({"ids": IDS, "wieght": WEIGHT}, "unknown input 'wieght' .near names: weight"),
    "given twice": (((IDS, WEIGHT), {"ids": IDS}), "unknown input 'ids'"),
    "key that is no name": ({1: IDS, "weight": WEIGHT}, "unknown input 1 "),
    "dtype": ((IDS, WEIGHT.double()), r"argument weight: expected float32\[3\], got float64\[3\]: another dtype"),
    "half": ((IDS.half(), WEIGHT), r"batch 0, argument ids: expected float32\[3\], got float16\[3\]"),
    "rank": ((IDS, WEIGHT[None]), r"argument weight: expected float32\[3\], got float32\[1, 3\]: 2 dimensions, not 1"),
    "scalar": ((IDS.sum(), WEIGHT), r"argument ids: expected float32\[3\], got float32\[\]: 0 dimensions"),
    "shape": ((IDS, noise(5)), r"argument weight: .* got float32\[5\]: dimension 0 is 5, not 3. Export .* dynamic"),
    "no tensor": ((IDS, [1.0, 2.0, 3.0]), r"argument weight: expected a tensor float32\[3\], got a list"),
    "numpy": ((IDS, WEIGHT.numpy()), r"argument weight: expected a tensor float32\[3\], got a ndarray.* transform="),
    "sparse": ((IDS, WEIGHT.to_sparse()), r"argument weight: expected float32\[3\], got a sparse_coo tensor"),
    "nested": ((IDS, torch.nested.nested_tensor([WEIGHT])), r"argument weight: expected .*, got a nested tensor"),
    "string": ("a photo", "batch 0 is a str; the program takes"),
    "none": (None, "batch 0 is a NoneType; the program takes"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfit_is_named(misfit: str, pair: ExportedProgram) -> None:
    """What does not match is told with batch, argument, what was expected and what came."""
    batch, message = MISFITS[misfit]
    with pytest.raises(BatchError, match=message) as caught:
        measured(pair, [batch])
    assert caught.value.ranges is None


def test_misfit_later_hands_over_the_batches_before(pair: ExportedProgram) -> None:
    """A batch that does not fit ends the run; the error holds the table of those before, and names the index."""
    with pytest.raises(BatchError, match=r"batch 2, argument ids: .*dimension 0 is 4, not 3") as caught:
        measured(pair, [(IDS, WEIGHT), (WEIGHT, IDS), (noise(4), WEIGHT)])
    assert caught.value.ranges is not None
    assert caught.value.ranges.frame.equals(measured(pair, [(IDS, WEIGHT), (WEIGHT, IDS)]).frame)


def test_keyword_inputs_are_not_guessed_from_positions(keywords: ExportedProgram) -> None:
    """What was exported by keyword is in no order that a position could mean: it is refused, with the names."""
    message = r"got 3 inputs, but the program takes 1 by position: \(x: .*(scale|bias): "
    with pytest.raises(BatchError, match=message):
        measured(keywords, [(X, SCALE, BIAS)])


NESTED_MISFITS: dict[str, tuple[Any, str]] = {
    "key": (
        {"image": X, "text": {}, "boxes": (X, X)},
        r"argument features\[1\]: expected .* keys \['mask'\], got keys",
    ),
    "no dict": (({"image": X, "text": X, "boxes": (X, X)},), r"argument features\[1\]: .*\['mask'\], got a Tensor"),
    "length": (
        ({"image": X, "text": {"mask": X}, "boxes": (X,)},),
        r"features\[2\]: expected a tuple of 2 items, got 1",
    ),
    "shape": (
        ({"image": noise(3), "text": {"mask": noise(2)}, "boxes": (noise(3), noise(3))},),
        r"argument features\['text'\]\['mask'\]: expected float32\[3\], got float32\[2\]",
    ),
}


@pytest.mark.parametrize("misfit", NESTED_MISFITS)
def test_misfit_inside_a_nested_input_is_named(misfit: str, nested: ExportedProgram) -> None:
    """The path into a nested input says where the misfit is."""
    batch, message = NESTED_MISFITS[misfit]
    with pytest.raises(BatchError, match=message):
        measured(nested, [batch])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X[:3], X[:3]), "argument mask: the program was exported with the constant None, got a tensor"),
        ((X[:3], None, False), "argument flag: .* constant True, got False"),
        ((X[:3], None, X[:3]), "argument flag: .* constant True, got a tensor"),
        ((X[:3], None, True, 3), "argument power: .* constant 2, got 3"),
        ((X[:3], None, True, X[:3].numpy()), r"argument power: .* constant 2, got array\("),
    ],
    ids=["tensor for none", "other flag", "tensor for flag", "other number", "array for number"],
)
def test_constants_cannot_change(batch: Any, message: str, options: ExportedProgram) -> None:
    """A value that the export has fixed is refused when another comes, a tensor too."""
    with pytest.raises(BatchError, match=message):
        measured(options, [batch])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((9, 6), (9, 6), r"argument ids: .*dimension 0 is 9, outside the exported range 2 to 8"),
        ((4, 17), (4, 17), r"argument ids: .*dimension 1 is 17, outside the exported range 2 to 16"),
        ((1, 6), (1, 6), r"argument ids: .*dimension 0 is 1, outside the exported range 2 to 8"),
        (
            (4, 6),
            (5, 6),
            r"argument weight: .*float32\[batch, length\], .* 0 is 5, but batch is 4 in this batch",
        ),
        ((4, 6), (4, 7), r"argument weight: .*dimension 1 is 7, but length is 6 in this batch"),
    ],
)
def test_dynamic_sizes_are_held_to_their_range(
    first: tuple[int, int], second: tuple[int, int], message: str, dynamic: ExportedProgram
) -> None:
    """A dynamic dimension is held to the exported range, and to one size in all inputs that share it."""
    with pytest.raises(BatchError, match=message):
        measured(dynamic, [(noise(*first), noise(*second))])


@pytest.mark.parametrize("size", [(2, 2), (8, 16), (3, 5)])
def test_dynamic_sizes_within_their_range_are_taken(size: tuple[int, int], dynamic: ExportedProgram) -> None:
    """Both ends of an exported range are inside."""
    assert_reads(dynamic, (ids := noise(*size), weight := noise(*size, seed=1)), ids, weight)


class Doubled(nn.Module):
    def forward(self, long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
        return long.sum() + short.sum()


@pytest.mark.parametrize(("long", "short"), [(10, 4), (7, 4), (8, 5)])
def test_derived_sizes_are_checked_before_their_symbol_is_seen(long: int, short: int) -> None:
    """A size of 2n is held to n, also when the input of size n comes later among the arguments."""
    half = Dim("half", min=2, max=32)
    shapes = {"long": {0: 2 * half}, "short": {0: half}}
    program = torch.export.export(Doubled(), (noise(8), noise(4)), dynamic_shapes=shapes)
    assert_reads(program, (first := noise(12), second := noise(6)), first, second)
    with pytest.raises(BatchError, match=rf"argument long: .*dimension 0 is {long}, but 2\*half is {2 * short}"):
        measured(program, [(noise(long), noise(short))])


def raising_at(index: int) -> Iterator[torch.Tensor]:
    for seed in range(index):
        yield noise(4, seed=seed)
    raise ConnectionError("the store went away")


@pytest.mark.parametrize("index", [0, 1, 3])
def test_dataloader_that_raises_keeps_what_it_gave(index: int, single: ExportedProgram) -> None:
    """An error of the dataloader is told with the batch, its cause, and the table of the batches before."""
    good = {0: "0 good batches", 1: "1 good batch", 3: "3 good batches"}[index]
    message = (
        f"raised ConnectionError at batch {index}, after {good}: the store went away \\(.*test_batches.py:[0-9]+\\)"
    )
    with pytest.raises(BatchError, match=message) as caught:
        measured(single, raising_at(index))
    assert isinstance(caught.value.__cause__, ConnectionError)
    if index == 0:
        assert caught.value.ranges is None
    else:
        assert caught.value.ranges is not None
        expected = measured(single, [noise(4, seed=seed) for seed in range(index)])
        assert caught.value.ranges.frame.equals(expected.frame)
        assert caught.value.ranges.calibration.batches == index


class Unopened:
    def __iter__(self) -> Iterator[Any]:
        raise OSError("no such share")


def test_dataloader_that_cannot_start() -> None:
    """An error before the first batch is one of the dataloader too."""
    with pytest.raises(BatchError, match="the dataloader raised OSError before batch 0: no such share"):
        measured(torch.export.export(Single(), (noise(4),)), Unopened())


def test_transform_that_raises_is_named(single: ExportedProgram) -> None:
    """An error of `transform` names the batch and what it was."""
    with pytest.raises(BatchError, match=r"transform raised KeyError on batch 1 \(a dict\): 'x'") as caught:
        measured(single, [{"x": X}, {"y": X}], transform=lambda batch: batch["x"])
    assert caught.value.ranges is not None
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "loader", [[], (), iter([]), DataLoader([]), {}], ids=["list", "tuple", "used up", "loader", "dict"]
)
def test_empty_dataloader_is_an_error(loader: Any, single: ExportedProgram) -> None:
    """No batch at all is an error that says so."""
    with pytest.raises(BatchError, match="gave no batch: it is empty, or an iterator that was used up"):
        measured(single, loader)


@pytest.mark.parametrize("loader", [5, None, X.sum(), noise], ids=["number", "none", "scalar", "function"])
def test_what_cannot_be_iterated_is_an_error(loader: Any, single: ExportedProgram) -> None:
    """An object that gives no iterator is named by its type."""
    with pytest.raises(BatchError, match=f"the dataloader is a {type(loader).__name__}, which cannot be iterated"):
        measured(single, loader)


@pytest.mark.parametrize("count", [0, -1])
def test_max_batches_below_one_is_an_error(count: int, single: ExportedProgram) -> None:
    """Asking for no batch is a mistake, not an empty table."""
    with pytest.raises(BatchError, match=f"max_batches={count}: give at least 1"):
        measured(single, [X], max_batches=count)


def test_batch_errors_are_calibcast_errors(single: ExportedProgram) -> None:
    """One base class catches every misfit."""
    with pytest.raises(CalibcastError):
        measured(single, [noise(5)])


def test_signature_prints_what_the_program_takes(keywords: ExportedProgram, options: ExportedProgram) -> None:
    """The text that errors show names every input with dtype and sizes."""
    assert "x: float32[4]" in str(signature_of(keywords))
    assert str(signature_of(options)) == (
        "(x: float32[3], mask: the constant None, flag: the constant True, power: the constant 2)"
    )


def test_checking_an_input_never_reads_it(monkeypatch):
    """An engine checks on every call; once a message that nobody saw printed the tensor, 90 ms a call on a GPU."""
    program = torch.export.export(
        torch.nn.Linear(4, 2), (torch.randn(3, 4),), dynamic_shapes={"input": {0: torch.export.Dim("n", min=1, max=9)}}
    )
    signature = signature_of(program)

    def refuse(*_):
        raise AssertionError("a tensor was read to check it")

    for name in ("__repr__", "__format__", "__str__", "tolist", "item", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    (flat,) = signature.flatten(torch.empty(5, 4), 0)
    assert flat.shape == (5, 4)


class PairFirst(nn.Module):
    """Its first argument is a sequence, which alone looks like the arguments of a call."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return pair[0] + pair[1] * x


class PairAndDict(nn.Module):
    def forward(self, pair: list[torch.Tensor], more: dict[str, torch.Tensor]) -> torch.Tensor:
        return pair[0] + pair[1] * more["x"]


class RowsOfRows(nn.Module):
    def forward(self, rows: list[list[torch.Tensor]]) -> torch.Tensor:
        return rows[0][0] * 2


def test_a_first_argument_that_is_a_sequence_can_be_called_and_given() -> None:
    """A call is taken as it is; a batch in each of the ways in which batches may come."""
    a, b, x = torch.ones(2), torch.ones(2) * 2, torch.ones(2) * 3
    one = signature_of(torch.export.export(PairFirst().eval(), ((a, b), x)))
    assert one.flatten_call(((a, b), x), {}) == [a, b, x]
    assert one.flatten_call(([a, b],), {"x": x}) == [a, b, x]
    for batch in (((a, b), x), [[a, b], x], (((a, b), x), {}), (((a, b),), {"x": x}), {"pair": (a, b), "x": x}):
        assert one.flatten(batch, 0) == [a, b, x]
    two = signature_of(torch.export.export(PairAndDict().eval(), ([a, b], {"x": x})))
    assert two.flatten_call(((a, b), {"x": x}), {}) == [a, b, x]
    for batch in (((a, b), {"x": x}), (([a, b], {"x": x}), {}), (([a, b],), {"more": {"x": x}})):
        assert two.flatten(batch, 0) == [a, b, x]
    three = signature_of(torch.export.export(RowsOfRows().eval(), ([[a]],)))
    assert three.flatten_call(([[a]],), {}) == [a]
    for batch in ([[a]], ([[a]],), (([[a]],), {})):
        assert three.flatten(batch, 0) == [a]


class Added(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_what_a_call_is_told_does_not_speak_of_batches() -> None:
    """Whatever is wrong with the arguments of a call: there is no dataloader and no transform to mend."""
    batch = Dim("b", min=2, max=4)
    signature = signature_of(
        torch.export.export(
            Added().eval(), (torch.ones(2, 3), torch.ones(2, 3)), dynamic_shapes=({0: batch}, {0: batch})
        )
    )
    good = torch.ones(2, 3)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((good, good, good), {}),
        ((good, good), {"unknown": 1}),
        ((good, 1.0), {}),
        ((good, good.double()), {}),
        ((good, good[0]), {}),
        ((good, torch.ones(2, 4)), {}),
        ((good, torch.ones(3, 3)), {}),
        ((torch.ones(9, 3), torch.ones(9, 3)), {}),
        ((good, [good]), {}),
        ((good, good.to_sparse()), {}),
    ]
    for args, kwargs in wrong:
        with pytest.raises(BatchError, match="the call") as caught:
            signature.flatten_call(args, kwargs)
        assert not any(word in str(caught.value) for word in ("batch", "transform", "datasets", "DataLoader"))
