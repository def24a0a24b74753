"""Nodes of a cast graph kept in fp32 after all."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calib import BuildError
from calib.execution import ProgramRunner
from engines.widening import restated, widened
from passes import PrecisionPlan, classify, insert_casts


class Chain(nn.Module):
    def forward(self, x):
        return torch.relu((x * 3).exp()) - 1


def half_chain():
    """x -> to fp16 -> mul -> exp -> relu -> sub -> to fp32"""
    program = torch.export.export(Chain(), (torch.randn(4),))
    plan = PrecisionPlan.from_types(program)
    low = tuple(replace(d, precision="low") for d in plan.decisions)
    return insert_casts(program, replace(plan, decisions=low))


def types(program):
    return {
        n.name: str(n.meta["val"].dtype).removeprefix("torch.") for n in program.graph.nodes if n.op == "call_function"
    }


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
