"""Nodes of a cast graph kept in fp32 after all."""

import io
import random
from dataclasses import replace

import pytest
import torch
from calibcast.calib import BuildError
from calibcast.calib.execution import ProgramRunner
from calibcast.engines.tensorrt.widening import restated, widenable, widened, with_movement
from calibcast.passes import PrecisionPlan, classify, insert_casts
from torch import nn

from benchmarks.fuzz.case import plan_by_hand, run_checked
from benchmarks.fuzz.programs import drawn, exported, inputs_of

LOW = {torch.float16, torch.bfloat16}


class Chain(nn.Module):
    def forward(self, x):
        return torch.relu((x * 3).exp()) - 1


def half_chain():
    """x -> to fp16 -> mul -> exp -> relu -> sub -> to fp32"""
    return all_low(Chain(), torch.randn(4))


def all_low(model, *inputs, keep_io_types=True):
    program = torch.export.export(model.eval(), inputs)
    plan = PrecisionPlan.from_types(program)
    low = tuple(replace(d, precision="low") for d in plan.decisions)
    return insert_casts(program, replace(plan, decisions=low), keep_io_types)


def types(program):
    """The type of each node that gives one tensor."""
    made = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "call_function"}
    return {n: str(v.dtype).removeprefix("torch.") for n, v in made.items() if isinstance(v, torch.Tensor)}


def test_the_named_nodes_compute_in_fp32_and_their_readers_see_what_they_saw():
    """before: mul16 -> exp16 -> relu16   after: mul16 -> to32 -> exp32 -> to16 -> relu16"""
    mixed = half_chain()
    before = [node.name for node in mixed.graph.nodes]
    wide = widened(mixed, {"exp"})
    found = types(wide)
    assert (found["mul"], found["exp"], found["relu"]) == ("float16", "float32", "float16")
    assert [node.name for node in mixed.graph.nodes] == before
    x = torch.randn(4)
    (ours,), (theirs,) = (ProgramRunner(p).run([x]) for p in (wide, mixed))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_between_two_of_the_nodes_nothing_is_rounded():
    """before: mul16 -> exp16 -> relu16 -> sub16   after: mul16 -> to32 -> exp32 -> relu32 -> to16 -> sub16"""
    mixed = half_chain()
    wide = widened(mixed, {"exp", "relu"})
    assert [t for n, t in types(wide).items() if n not in {"mul", "sub"}] == [
        "float16", "float32", "float32", "float32", "float16", "float32",
    ]  # fmt: skip
    x = torch.tensor([0.1, 0.2, 3.6, -2.0])
    inner = torch.relu((x.half() * 3).float().exp()).half() - 1
    torch.testing.assert_close(ProgramRunner(wide).run([x])[0], inner.float(), rtol=0, atol=0)


@pytest.mark.parametrize("keep_io_types", [True, False])
def test_a_program_kept_whole_in_fp32_has_no_cast_but_of_its_outputs(keep_io_types, tmp_path):
    """The output itself is one of the nodes: what the program is said to give is renamed with it."""
    mixed = all_low(Chain(), torch.randn(4), keep_io_types=keep_io_types)
    wide = widened(mixed, {"mul", "exp", "relu", "sub"})
    torch.export.save(wide, tmp_path / "wide.pt2")
    found = types(torch.export.load(tmp_path / "wide.pt2"))
    assert {found[name] for name in ("mul", "exp", "relu", "sub")} == {"float32"}
    (result,) = ProgramRunner(wide).run([torch.ones(4)])
    assert result.dtype == (torch.float32 if keep_io_types else torch.float16)
    assert len(found) == 4 + (not keep_io_types)
    torch.testing.assert_close(result.float(), Chain()(torch.ones(4)), rtol=1e-3, atol=0)


class Halves(nn.Module):
    def forward(self, x):
        first, second = (x * 3).transpose(0, 1).chunk(2)
        best, places = first.max(0)
        return best * second[places % 2].sum(0)


def test_what_only_moves_a_result_follows_it_and_nothing_else_does():
    """before: mul16 -> transpose16 -> chunk16 -> max16, index16   after: all of it in fp32 -> to16 -> max16; index32"""
    mixed = all_low(Halves(), torch.randn(3, 4))
    names = with_movement(mixed, {"mul"})
    assert names == ("mul", "transpose", "chunk", "index")
    found = types(widened(mixed, names))
    assert [found[name] for name in ("mul", "transpose", "index", "sum_1")] == [
        "float32", "float32", "float32", "float16",
    ]  # fmt: skip
    assert with_movement(mixed, {"transpose"}) == ("transpose", "chunk", "index")
    assert with_movement(mixed, ()) == ()


def test_a_node_that_gives_several_tensors_is_kept_in_fp32_whole():
    """Also where one of them is of integers: it has no other type."""
    x = torch.randn(3, 4)
    mixed = all_low(Halves(), x)
    assert {node.name for node in widenable(mixed)} >= {"chunk", "max_1"}
    wide = widened(mixed, {"max_1"})
    values = next(node.meta["val"] for node in wide.graph.nodes if node.name == "max_1")
    assert [value.dtype for value in values] == [torch.float32, torch.int64]
    torch.testing.assert_close(ProgramRunner(wide).run([x])[0], ProgramRunner(mixed).run([x])[0])


class Written(nn.Module):
    def forward(self, x):
        y = x.exp()
        y.mul_(2)
        return y.relu() + 1


def test_where_something_is_written_in_place_all_read_what_was_written():
    """relu32 must not read exp32, which is from before mul_ wrote into the cast of it."""
    x = torch.randn(4)
    mixed = all_low(Written(), x)
    wide = widened(mixed, {"exp", "relu"})
    torch.testing.assert_close(ProgramRunner(wide).run([x])[0], x.exp() * 2 + 1, rtol=2e-3, atol=2e-3)


class WrittenThroughView(nn.Module):
    def forward(self, x):
        y = x.exp()
        y.transpose(0, 1).mul_(2)
        return y.relu() + x.transpose(0, 1)


def test_a_view_that_is_written_through_is_never_kept_in_fp32():
    """A copy of it would be written, and y would stay as it was. The view of x, which nothing writes, can be."""
    x = torch.randn(3, 3)
    mixed = all_low(WrittenThroughView(), x)
    names = {node.name for node in widenable(mixed)}
    assert names == {"exp", "relu", "transpose_1", "add"}
    assert "transpose" not in with_movement(mixed, names)
    wanted = (x.exp() * 2).relu() + x.T
    torch.testing.assert_close(ProgramRunner(widened(mixed, names)).run([x])[0], wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("number", range(40))
def test_random_programs_give_what_they_gave(number):
    """Whatever nodes are kept, written in place or not: types as recorded, of the outputs as before, and the values."""
    draw = drawn(7, number)
    program = exported(draw.recipe)
    coins = -1 if draw.coins is None else draw.coins
    plan = plan_by_hand(program, lambda i: bool(coins >> i & 1), draw.low_type, legal=True)
    mixed = insert_casts(program, plan, keep_io_types=number % 3 != 0)
    wanted = run_checked(mixed, *inputs_of())
    able = sorted(node.name for node in widenable(mixed))
    for names in (able, with_movement(mixed, random.Random(number).sample(able, len(able) // 2))):
        wide = widened(mixed, names)
        low = {node.name for node in wide.graph.nodes if getattr(node.meta.get("val"), "dtype", None) in LOW}
        assert not low & set(names)
        for ours, theirs in zip(run_checked(wide, *inputs_of()), wanted, strict=True):
            if isinstance(theirs, torch.Tensor):
                assert ours.dtype == theirs.dtype
                if draw.recipe.smooth and theirs.is_floating_point():
                    error, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
                    assert error <= 0.08 * size + 2e-3 * theirs.numel() ** 0.5


class Branches(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda a: (a * 2,), lambda a: (a - 1,), (x * 2,))[0] + 1


def test_a_region_is_never_kept_in_fp32():
    """What is in its branches says its types, and a graph that says otherwise could not even be saved."""
    program = torch.export.export(Branches().half(), (torch.randn(3).half(),))
    names = {node.name for node in widenable(program)}
    assert names == {"mul", "sum_1", "add"}
    torch.export.save(widened(program, names), io.BytesIO())


class Gates(nn.Module):
    def forward(self, x):
        first, second = (x * 3).chunk(2, 1)
        return first * second


def test_parts_of_a_kept_tensor_are_not_rounded_either():
    """Its parts have gaps between their rows, which a cast would close."""
    x = torch.randn(3, 4)
    wide = widened(all_low(Gates(), x), {"mul", "chunk", "mul_1"})
    assert set(types(wide).values()) == {"float32"}
    assert torch.equal(ProgramRunner(wide).run([x])[0], Gates()(x))


class Spread(nn.Module):
    def forward(self, x):
        return (x.half() * 2)[:, None].expand(4, 5, 6).float().view(-1)


def test_a_cast_that_makes_a_tensor_dense_is_no_cast_to_pass_by():
    x = torch.randn(4, 6)
    program = torch.export.export(Spread(), (x,)).run_decompositions()
    wide = widened(program, with_movement(program, {"mul"}))
    torch.testing.assert_close(ProgramRunner(wide).run([x])[0], Spread()(x), rtol=2e-3, atol=2e-3)


def test_it_saves_and_loads(tmp_path):
    wide = widened(half_chain(), {"exp", "relu"})
    torch.export.save(wide, tmp_path / "wide.pt2")
    assert types(torch.export.load(tmp_path / "wide.pt2"))["relu"] == "float32"


def test_a_node_that_states_its_type_is_refused():
    mixed = half_chain()
    cast = next(node.name for node in mixed.graph.nodes if "_as_" in node.name)
    with pytest.raises(BuildError, match=f"node {cast} cannot be kept in fp32 afterwards"):
        widened(mixed, {cast})


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(10, 4, mode="sum"), nn.Linear(4, 2)

    def forward(self, words):
        return self.layer(self.bag(words))


def test_the_type_of_a_low_embedding_bag_is_said_once_more():
    """before: embedding_bag16 -> linear16   after: embedding_bag16 -> to32 -> to16 -> linear16, of the same values"""
    words = torch.arange(6).reshape(2, 3)
    program = torch.export.export(Bags().eval(), (words,))
    mixed = insert_casts(program, classify(program, None))
    result = restated(mixed)
    linear = next(node for node in result.graph.nodes if node.name == "linear")
    back = linear.args[0]
    assert [back.meta["val"].dtype, back.args[0].meta["val"].dtype] == [torch.float16, torch.float32]
    assert len(result.graph.nodes) == len(mixed.graph.nodes) + 2
    assert torch.equal(ProgramRunner(result).run([words])[0], ProgramRunner(mixed).run([words])[0])


def test_a_program_without_one_is_left_alone():
    mixed = half_chain()
    assert restated(mixed) is mixed
