"""The table of operators against the operators: each is run, and what is said of it is looked at."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from calibcast.calib.operators import OPERATORS, canonical, operator_of
from torch.utils import _pytree as pytree

from tests.calib.operator_examples import IMAGE, MOVES, ROW, X, Y

NAMES = [entry.name for entry in OPERATORS]
# Names that torch 2.11 still has and 2.14 no longer.
GONE = {"cholesky", "qr"}


def schemas(name: str) -> list[Any]:
    """The schemas of all overloads, the in-place ones too."""
    spaces = (torch.ops.aten, torch.ops.prims)
    packets = [getattr(space, n) for space in spaces for n in (name, f"{name}_") if hasattr(space, n)]
    return [getattr(packet, overload)._schema for packet in packets for overload in packet.overloads()]


def run(name: str, *arguments: Any) -> Any:
    packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, f"{name}_")
    return packet(*(pytree.tree_map_only(torch.Tensor, torch.clone, argument) for argument in arguments))


def saying(field: str) -> list[str]:
    return [entry.name for entry in OPERATORS if entry.says(field)]


def numbers(value: Any) -> set[float]:
    return {n for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) for n in t.double().flatten().tolist()}


@pytest.mark.parametrize("name", sorted({*NAMES, *(alias for e in OPERATORS for alias in e.aliases)} - GONE))
def test_operator_exists(name: str) -> None:
    """Torch has an operator of each name."""
    assert schemas(name)


def test_each_operator_has_one_entry() -> None:
    """No name stands for two entries, and each leads to its own."""
    names = [name for entry in OPERATORS for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    assert all(operator_of(name) is entry for entry in OPERATORS for name in (entry.name, *entry.aliases))


def test_unknown_operator_does_nothing_that_is_known() -> None:
    """Of an operator that the table lacks nothing is said, but that its kind has no half-precision kernels."""
    assert operator_of("nonsense").name == canonical("nonsense") == "nonsense"
    assert not operator_of("nonsense").moves
    assert operator_of("fft_rfft").never_low
    assert operator_of("linalg_solve").never_low
    assert not operator_of("linalg_vector_norm").never_low
    assert not operator_of("linalg_cross").never_low


@pytest.mark.parametrize(("alias", "entry"), [(alias, entry) for entry in OPERATORS for alias in entry.aliases])
def test_alias_takes_what_its_operator_takes(alias: str, entry: Any) -> None:
    """An overload of an alias has the arguments of one of the operator's, so what is said by position or name holds."""
    named = bool(entry.literals or entry.epsilon)
    ours, theirs = (
        {tuple((str(a.type), a.name if named else "") for a in schema.arguments) for schema in schemas(name)}
        for name in (entry.name, alias)
    )
    assert ours & theirs


@pytest.mark.parametrize("name", saying("moves"))
def test_mover_moves(name: str) -> None:
    """Its results are elements of its arguments, or a number that it fills in."""
    arguments = MOVES[name]
    filled = {0.0, *(float(a) for a in arguments if isinstance(a, (int, float)))}
    assert numbers(run(name, *arguments)) <= numbers(arguments) | filled


SHARED = {
    **{name: MOVES[name] for name in saying("shares") if name in MOVES},
    "type_as": (X, Y),
    "sum_to_size": (X, (4, 6)),
    "conj_physical": (X,),
    "cartesian_prod": ([ROW],),
    "einsum": ("ij->ji", [X]),
}


@pytest.mark.parametrize("name", saying("shares"))
def test_sharer_shares(name: str) -> None:
    """Its result lies in the storage of the argument that is named, which its schema does not say."""
    arguments, place = SHARED[name], operator_of(name).shares
    packet = getattr(torch.ops.aten, name)
    given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(arguments[place])}
    made = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(packet(*arguments))}
    assert made <= given
    assert any(not any(r.alias_info for r in schema.returns) for schema in schemas(name))


@pytest.mark.parametrize(("name", "arguments"), [("cartesian_prod", ([ROW, ROW],)), ("einsum", ("i,i->i", [ROW, ROW]))])
def test_of_several_it_is_fresh(name: str, arguments: tuple[Any, ...]) -> None:
    """Given two tensors, the result is a new one."""
    assert operator_of(name).fresh_of_several
    made = getattr(torch.ops.aten, name)(*arguments)
    assert made.untyped_storage().data_ptr() != ROW.untyped_storage().data_ptr()


@pytest.mark.parametrize("entry", [e for e in OPERATORS if e.training], ids=lambda entry: entry.name)
def test_training_flag_is_one(entry: Any) -> None:
    """The argument that is said to switch training on is called so, and so are the others."""
    for names in ([argument.name for argument in schema.arguments] for schema in schemas(entry.name)):
        if entry.training.statistics is not None and "running_mean" not in names:
            continue  # it has its batch's statistics in evaluation, too
        assert names[entry.training.flag] in {"train", "training", "use_input_stats"}
        assert entry.training.share is None or names[entry.training.share] == "p"
        assert entry.training.statistics is None or names[entry.training.statistics] == "running_mean"


@pytest.mark.parametrize("field", ["epsilon", "literals"])
def test_numbers_are_arguments(field: str) -> None:
    """What is said to be a number in a call is an argument of an overload, and a number there."""
    for entry in OPERATORS:
        wanted = {getattr(entry, field)} if field == "epsilon" else set(getattr(entry, field))
        kinds = {a.name: str(a.type) for s in schemas(entry.name) for a in s.arguments if "Tensor" not in str(a.type)}
        assert all(kinds[name] in {"number", "float", "Optional[number]", "Optional[float]"} for name in wanted - {""})


BIG = 1e6
CHECKED = {
    "masked_fill": (X, X > 1, BIG),
    "fill": (X, BIG),
    "full_like": (X, BIG),
    "new_full": (X, (2,), BIG),
    "full": ((2,), BIG),
    "linspace": (0.0, BIG, 4),
    "index_fill": (X, 0, torch.tensor([0]), BIG),
    "fill_diagonal": (X, BIG),
    "scatter": (X, 0, torch.zeros(1, 1, dtype=torch.int64), BIG),
    "clamp": (X, -BIG, BIG),
    "clamp_min": (X, BIG),
    "clamp_max": (X, BIG),
    "hardtanh": (X, -BIG, BIG),
    "threshold": (X, 1.0, BIG),
    "pow": (X, BIG),
    "constant_pad_nd": (IMAGE, (1, 1), BIG),
    "pad": (IMAGE, (1, 1), "constant", BIG),
}


@pytest.mark.parametrize("name", [name for name in saying("checks_numbers") if name != "scalar_tensor"])
def test_number_too_large_is_refused(name: str) -> None:
    """In half precision its kernel raises, and does not give inf. That of `scalar_tensor` does so on a GPU alone."""
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.half() if t.is_floating_point() else t, CHECKED[name])
    packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, f"{name}_")
    made = any(isinstance(a, torch.Tensor) for a in arguments)
    with pytest.raises(RuntimeError, match="without overflow"):
        packet(*arguments, **({} if made else {"dtype": torch.float16}))


@pytest.mark.parametrize("name", saying("selects"))
def test_selection_is_by_order(name: str) -> None:
    """Its results are elements of its input, the same ones after a change that keeps order."""
    extra = {"topk": (2,), "kthvalue": (2,)}.get(name, ())
    before, after = run(name, X, *extra), run(name, X.exp(), *extra)
    values = [t for t in pytree.tree_leaves(before) if t.is_floating_point()]
    changed = [t for t in pytree.tree_leaves(after) if t.is_floating_point()]
    assert numbers(values) <= numbers(X)
    assert all(torch.equal(old.exp(), new) for old, new in zip(values, changed, strict=True))


# What a keeper of rounding takes after its input, and the numbers that it may put in place of elements.
KEPT = {
    "clamp": ((-0.5, 0.5), {-0.5, 0.5}),
    "clamp_min": ((-0.5,), {-0.5}),
    "clamp_max": ((0.5,), {0.5}),
    "hardtanh": ((-0.5, 0.5), {-0.5, 0.5}),
    "relu6": ((), {6.0}),
    "masked_fill": ((torch.eye(4) > 0, -3.0), {-3.0}),
    "pad": (([1, 1], "constant", -3.0), {-3.0}),
    "constant_pad_nd": (([1, 1], -3.0), {-3.0}),
}


@pytest.mark.parametrize("name", saying("keeps_rounded"))
def test_keeper_of_rounding_rounds_no_more(name: str) -> None:
    """Of what is rounded it gives elements, negated, zero, or replaced by its numbers."""
    x = (4 * torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))).half().float()
    more, filled = KEPT.get(name, ((), set()))
    if name[-2:] in {"1d", "2d", "3d"}:
        dims = int(name[-2])
        x = x.flatten(1 + dims)
        more = (2,) if "pool" in name else ([8] * dims,) if "upsample" in name else ([1] * 2 * dims,)
    made = torch.where(x > 1, x, -3.0) if name == "where" else run(name, x, *more)
    assert numbers(made) <= numbers(x) | numbers(-x) | {0.0} | filled | ({-3.0} if name == "where" else set())


@pytest.mark.parametrize("name", saying("compares"))
def test_comparison_is_of_order(name: str) -> None:
    """It comes out alike after a change that keeps order."""
    assert torch.equal(run(name, X, Y), run(name, X.exp(), Y.exp()))
    assert run(name, X, Y).dtype == torch.bool


@pytest.mark.parametrize("name", saying("equates"))
def test_equality_is_of_elements(name: str) -> None:
    """It tells which elements are equal, also after a change that keeps order."""
    same = torch.where(torch.arange(X.numel()).reshape(X.shape) % 2 == 0, X, Y)
    assert torch.equal(run(name, X, same), run(name, X.exp(), same.exp()))
    assert {bool(n) for n in run(name, X, same).flatten()} == {True, False}


FILLED = {
    "full": ((2, 3), 4.0),
    "fill": (X, 4.0),
    "full_like": (X, 4.0),
    "new_full": (X, (2,), 4.0),
    "scalar_tensor": (4.0,),
}


@pytest.mark.parametrize("name", saying("fills"))
def test_filler_fills(name: str) -> None:
    """Its result is the number that it is given, everywhere."""
    assert numbers(run(name, *FILLED[name])) == {4.0}


@pytest.mark.parametrize("name", saying("centred"))
def test_centred_operator_takes_the_mean_away(name: str) -> None:
    """A shift of all that it reduces together changes nothing but, where it gives one, the mean."""
    arguments = CENTRED[name]
    first, shifted = run(name, IMAGE, *arguments), run(name, IMAGE + 8, *arguments)
    first, shifted = (t[0] if isinstance(t, tuple) else t for t in (first, shifted))
    torch.testing.assert_close(first, shifted, rtol=1e-3, atol=1e-3)


CENTRED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["var", "std", "var_mean", "std_mean"], ([2, 3],)),
    "layer_norm": ([6], None, None, 1e-5),
    "native_layer_norm": ([6], None, None, 1e-5),
    "group_norm": (2, None, None, 1e-5),
    "native_group_norm": (None, None, 2, 4, 36, 2, 1e-5),
    "instance_norm": (None, None, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("name", ["rms_norm", "_fused_rms_norm", "norm", "linalg_vector_norm"])
def test_other_norms_do_not(name: str) -> None:
    """What is not centred sees the shift."""
    assert not operator_of(name).centred
    arguments = ([6], None, 1e-5) if "rms" in name else ()
    first, shifted = run(name, IMAGE, *arguments), run(name, IMAGE + 8, *arguments)
    first, shifted = (t[0] if isinstance(t, tuple) else t for t in (first, shifted))
    assert (first - shifted).abs().max() > 1e-2


@pytest.mark.parametrize("entry", [e for e in OPERATORS if e.window], ids=lambda entry: entry.name)
def test_pool_has_its_rank(entry: Any) -> None:
    """A pool of d dimensions takes the mean of a window of d."""
    x = torch.arange(2.0 * 4**entry.window).reshape(2, *[4] * entry.window)
    pooled = run(entry.name, x, [1 if entry.adaptive else 4] * entry.window)
    torch.testing.assert_close(pooled.flatten(), x.flatten(1).mean(1))


def test_names_follow_one_another() -> None:
    """Every entry has a name, and aliases that are other names."""
    assert all(entry.name and entry.name not in entry.aliases for entry in OPERATORS)
    assert all(one is not other for one, other in pairwise(OPERATORS))


WIDE = torch.linspace(0.3, 0.7, 41, dtype=torch.float64)
ERRORS = {
    "clamp": (0.0, 1.0), "clamp_min": (0.0,), "clamp_max": (1.0,), "hardtanh": (0.0, 1.0), "threshold": (0.1, 0.0),
    "pow": (2.0,), "mul": (3.0,), "div": (3.0,), "leaky_relu": (0.1,), "maximum": (WIDE / 2,), "minimum": (WIDE * 2,),
    "nan_to_num": (0.0,), "constant_pad_nd": ([1, 1],), "pad": ([1, 1],), "masked_fill": (WIDE > 9, 0.0), "glu": (),
    "softmax": (-1,), "_softmax": (-1, False), "_safe_softmax": (-1,), "log_softmax": (-1,),
    "_log_softmax": (-1, False), "logsumexp": ([0],), "prelu": (torch.tensor([0.1], dtype=torch.float64),),
    **dict.fromkeys(("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"), (WIDE / 2,)),
    "floor_divide": (0.01,), "remainder": (0.01,), "fmod": (0.01,), "kthvalue": (3,), "topk": (3,),
}  # fmt: skip


def changed(name: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first results of an operator for two arguments."""
    made = [run(name, value, *ERRORS.get(name, ())) for value in (x, y)]
    return tuple(m[0] if isinstance(m, (tuple, list)) else m for m in made)  # type: ignore[return-value]


def with_error(kind: str) -> list[str]:
    """Operators of one number, or of others that stay, whose error is of a kind."""
    several = {"where", "index_fill", "embedding", "embedding_bag", "_embedding_bag", "scatter_add", "scatter_reduce"}
    several |= {"index_put", "index_add", "index_copy", "glu", "rrelu", "im2col", "col2im", "_unique", "unique_dim"}
    pooled = ("pool", "upsample", "pad1d", "pad2d", "pad3d", "_aa")
    apart = [entry for entry in OPERATORS if entry.multiplies or entry.angle or "norm" in entry.name.split("_")]
    entries = [entry.name for entry in OPERATORS if entry.error == kind and entry not in apart]
    return [name for name in entries if name not in several and not any(part in name for part in pooled)]


@pytest.mark.parametrize("name", with_error("share"))
def test_share_stays_a_share(name: str) -> None:
    """A thousandth more makes at most two thousandths of the result."""
    before, after = changed(name, WIDE, WIDE * 1.001)
    assert ((after - before).abs() <= 2.01e-3 * before.abs()).all()


@pytest.mark.parametrize("name", with_error("same"))
def test_error_gets_no_larger(name: str) -> None:
    """A slope is at most a little above 1."""
    before, after = changed(name, WIDE, WIDE + 1e-3 * torch.cos(50 * WIDE))
    assert (after - before).abs().max() <= 1.2e-3


@pytest.mark.parametrize("name", [name for name in with_error("exponent") if name not in {"sinh", "expm1", "tan"}])
def test_error_becomes_a_share(name: str) -> None:
    """Of ten times as large a result, the same error of the argument makes the same share."""
    shift = 0.0 if "softmax" in name else 3.0
    before, after = changed(name, WIDE + shift, WIDE + shift + 1e-3 * torch.cos(50 * WIDE))
    assert ((after - before).abs() <= 1.2e-3 * before.abs()).all()


@pytest.mark.parametrize("name", ["sinh", "expm1", "tan"])
def test_error_becomes_a_share_far_out(name: str) -> None:
    """Where they are large, or steep, their error is one of the result or more."""
    at = torch.tensor([1.5 if name == "tan" else 10.0], dtype=torch.float64)
    before, after = changed(name, at, at + 1e-5)
    assert (after - before).abs() >= 0.9e-5 * before.abs()


@pytest.mark.parametrize("name", with_error("logarithm"))
def test_share_becomes_an_error(name: str) -> None:
    """A thousandth more adds the same to all results."""
    before, after = changed(name, WIDE, WIDE * 1.001)
    torch.testing.assert_close(after - before, (after - before)[:1].expand(41))


@pytest.mark.parametrize("name", saying("angle"))
def test_angle_is_as_exact_as_its_vector(name: str) -> None:
    """Its second argument is the first coordinate. An error of a thousandth of the length makes one of 0.001 rad."""
    around = torch.linspace(-3.1, 3.1, 63, dtype=torch.float64)
    for length in (1e-3, 1.0, 1e3):
        y, x = length * around.sin(), length * around.cos()
        torch.testing.assert_close(run(name, y, x), around)
        off = run(name, y + 1e-3 * length * around.cos(), x - 1e-3 * length * around.sin()) - around
        torch.testing.assert_close(off, torch.full_like(off, 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", saying("multiplies"))
def test_shares_of_factors_add_up(name: str) -> None:
    """A thousandth more in each of 8 factors is 8 thousandths in their product."""
    x = 1 + 0.1 * torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, after = run(name, x, 1), run(name, x * 1.001, 1)
    last = (after / before).reshape(4, -1)[:, -1]
    torch.testing.assert_close(last, torch.full_like(last, 1.001**8))


@pytest.mark.parametrize("name", saying("slopes"))
def test_between_steps_an_error_stays(name: str) -> None:
    """It takes whole periods away, and leaves the error."""
    x = torch.tensor([0.3, 7.25, 100.6], dtype=torch.float64)
    period = () if name == "frac" else (1.0,)
    torch.testing.assert_close(run(name, x + 1e-3, *period) - run(name, x, *period), torch.full_like(x, 1e-3))


@pytest.mark.parametrize("name", ["norm", "linalg_vector_norm"])
def test_a_norm_is_off_by_no_more_than_its_vector(name: str) -> None:
    """The triangle inequality."""
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    e = 1e-2 * x.roll(1)
    assert (run(name, x + e, 2, [1]) - run(name, x, 2, [1])).abs().le(e.norm(dim=1)).all()


@pytest.mark.parametrize("name", with_error("step"))
def test_step_tips_over(name: str) -> None:
    """A small error makes a difference of a step, or of a whole period, somewhere."""
    scaled = WIDE if name in ERRORS else 103 * WIDE
    before, after = changed(name, scaled, scaled + (1e-4 if name in ERRORS else 0.04))
    assert (after - before).abs().max() > 5e-3


@pytest.mark.parametrize(
    ("name", "pole"), [(e.name, pole) for e in OPERATORS for pole in e.poles if pole.exponent is None]
)
def test_result_is_steep_at_a_pole(name: str, pole: Any) -> None:
    """Its slope is a hundred times as large next to the pole as a little away from it, from one side at least."""

    def slope(distance: float) -> float:
        near = torch.tensor([pole.at - distance, pole.at + distance], dtype=torch.float64)
        other = torch.ones(2, dtype=torch.float64)
        rise = near * (1 + 1e-6) if pole.at == 0 else near + (near - pole.at) * 1e-6
        first, second = (run(name, *([other] * pole.argument), value) for value in (near, rise))
        found = ((second - first) / (rise - near)).abs()
        return float(found[found.isfinite()].max())

    if name not in {"floor_divide", "remainder", "fmod"}:  # which have a step at every multiple there
        assert slope(1e-6) > 100 * slope(1e-1)


@pytest.mark.parametrize("name", [n for n in saying("adds")])
def test_adder_adds(name: str) -> None:
    """The sum, or the difference, of its first two arguments."""
    sign = -1 if operator_of(name).subtracts else 1
    assert torch.equal(run(name, X, Y).abs(), (X + sign * Y).abs())


def test_powers_and_averages() -> None:
    """Powers are what they are said to be, and means divide by the number of terms."""
    for entry in (entry for entry in OPERATORS if entry.power != 1.0):
        torch.testing.assert_close(run(entry.name, X), X**entry.power)
    assert torch.equal(run("pow", X, 3.0), X**3.0)
    assert set(saying("powers")) == {"pow"}
    for name in saying("averages"):
        torch.testing.assert_close(run(name, X) * X.numel(), X.sum())


@pytest.mark.parametrize("name", [n for n in saying("product") if n not in {"lstm", "gru", "rnn_tanh", "rnn_relu"}])
def test_product_is_counted_as_work(name: str) -> None:
    """It is one of those that sum products: with its operands made three times as large, nine times as much."""
    image, kernel = torch.randn(1, 2, 5, 5, 5), torch.randn(2, 2, 3, 3, 3)
    rank = next((int(part) for part in name if part.isdigit()), 2)
    first, second = image.flatten(1 + rank) if rank < 3 else image, kernel.flatten(1 + rank) if rank < 3 else kernel
    if "conv" in name:
        first = torch.randn(1, 2, *[5] * rank)
        second = torch.randn(2, 2, *[3] * rank)
    else:
        first, second = PAIRS.get(name, (X, Y.mT))
    once, thrice = (_product(name, first * k, second * k, rank) for k in (1, 3))
    if name != "scaled_dot_product_attention":
        torch.testing.assert_close(thrice, 9 * once, rtol=1e-4, atol=1e-4)


V = torch.randn(5)
PAIRS = {
    "linear": (X, Y),
    "bmm": (X[None], Y.mT[None]),
    "baddbmm": (X[None], Y.mT[None]),
    "addbmm": (X[None], Y.mT[None]),
    "mv": (X, Y[0]),
    "addmv": (X, Y[0]),
    "dot": (V, V + 1),
    "bilinear": (X, Y),
    "scaled_dot_product_attention": (X[None], Y[None]),
}


def _product(name: str, a: torch.Tensor, b: torch.Tensor, rank: int) -> torch.Tensor:
    ones = [1] * rank
    plain = ([1] * rank, [0] * rank, ones)
    calls: dict[str, Any] = {
        "convolution": lambda: run(name, a, b, None, *plain, False, [0] * rank, 1),
        "_convolution": lambda: run(name, a, b, None, *plain, False, [0] * rank, 1, False, False, False, False),
        "einsum": lambda: torch.ops.aten.einsum("ij,jk->ik", [a, b]),
        "tensordot": lambda: run(name, a, b, [1], [0]),
        "bilinear": lambda: run(name, a, b, torch.ones(2, 6, 6), None),
        "addmm": lambda: run(name, torch.zeros(4, 4), a, b),
        "baddbmm": lambda: run(name, torch.zeros(1, 4, 4), a, b),
        "addbmm": lambda: run(name, torch.zeros(4, 4), a, b),
        "addmv": lambda: run(name, torch.zeros(4), a, b),
        "scaled_dot_product_attention": lambda: run(name, a, b, b),
    }
    return calls.get(name, lambda: run(name, a, b))()


NAMED = {"transposed_at": "transposed", "mask_at": "attn_mask", "variance_at": "running_var", "places": "grid"}


@pytest.mark.parametrize(("place", "argument"), NAMED.items())
def test_places_are_those_of_the_schema(place: str, argument: str) -> None:
    """An argument that is named by its position is the one that is meant."""
    for name in saying(place):
        for schema in schemas(name):
            position = getattr(operator_of(name), place)
            assert "softmax" in name or schema.arguments[position].name == argument


@pytest.mark.parametrize("name", [n for n in saying("never_low") if n not in GONE])
def test_nothing_else_is_said_of_what_is_never_low(name: str) -> None:
    """An operator that stays in fp32 moves, adds and reads nothing in another type."""
    assert not any(operator_of(name).says(field) for field in ("moves", "adds", "converts", "product", "hides"))
