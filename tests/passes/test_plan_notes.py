"""Small things that a plan, a comparison and a refusal say, each at the place where it turns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.pt2.refusal import RefusedError, shown
from calibcast.calib.pt2.treespecs import _MOST_DEPTH, _check_spec
from calibcast.calib.statistic_names import BINS
from calibcast.passes import Lost, NodeFacts, TensorFacts, classify, compare, insert_casts
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.rescaling.measures import _importance
from calibcast.passes.tensor_rules import Storage
from torch import nn

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (X,))


def test_a_plan_names_the_edges_that_cost_most_however_small_their_cost() -> None:
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    summary = classify(program, calibrate(program, [X], progress=False)).rounding
    assert summary is not None
    assert len(summary.edges) > 2
    costs = [edge.sqnr_db for edge in summary.edges]
    assert costs == sorted(costs)
    assert 40 < costs[0] < 100


@pytest.mark.parametrize(
    ("value", "said"), [(65504.0, None), (70000.0, "values up to 7e+04: inf in float16"), (1e-9, "zero in float16")]
)
def test_a_plan_notes_weights_that_become_inf_or_zero(value: float, said: str | None) -> None:
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.weight[0, 0] = value
    program = program_of(model)
    ranges = calibrate(program, [X], progress=False, rounding_batches=0)
    notes = classify(program, ranges, nodes_to_include=[".*"]).notes
    assert [said in note for note in notes if "weight" in note] == ([] if said is None else [True])


def test_the_first_row_of_a_comparison_is_what_became_nonfinite(plan_of: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x * 1e5).tanh(), ((x + 3000) - 3000) * 2

    program = program_of(Net())
    frame = compare(program, insert_casts(program, plan_of(program, lambda _: True)), [X], progress=False).frame
    assert frame["nonfinite_alone"][0] > 0
    rest = frame.filter(frame["nonfinite_alone"] == 0)["sqnr_db"].to_list()
    assert rest == sorted(rest)
    assert rest[0] < 20 < math.inf


def test_a_table_has_a_bin_for_each_exponent() -> None:
    program = program_of(nn.Linear(8, 8))
    frame = calibrate(program, [X], progress=False, rounding_batches=0).frame
    assert {len(counts) for counts in frame["histogram"].to_list()} == {256} == {BINS}


@pytest.mark.parametrize(("length", "cut"), [(78, False), (79, True)])
def test_a_piece_of_a_hostile_file_is_shown_in_eighty_characters(length: int, cut: bool) -> None:
    said = shown("x" * length)  # and two quotes
    assert len(said) == 80
    assert said.endswith("...") is cut


@pytest.mark.parametrize(("depth", "refused"), [(_MOST_DEPTH, False), (_MOST_DEPTH + 1, True)])
def test_nesting_is_refused_beyond_its_limit(depth: int, refused: bool) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    if refused:
        with pytest.raises(RefusedError, match="the nesting of inputs"):
            _check_spec(leaf, depth)
    else:
        _check_spec(leaf, depth)


def test_what_is_long_is_not_in_the_repr_of_a_plan_and_of_facts() -> None:
    program = program_of(nn.Linear(8, 8))
    ranges = calibrate(program, [X], progress=False)
    plan = repr(classify(program, ranges))
    assert not any(f"{name}=" in plan for name in ("budgets", "flips", "digests"))
    facts = repr(ProgramFacts.of(program, ranges))
    assert not any(f"{name}=" in facts for name in ("leading", "outlines", "ties", "rounding", "sizes"))


def test_inputs_weights_and_views_weigh_nothing_but_being_there() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(8, 4).tanh()

    weights = _importance(program_of(Net()))
    assert weights["x"] == weights["view"] == pytest.approx(1e-4 / len(weights))
    assert weights["tanh"] == pytest.approx(1 + 1e-4 / len(weights))


def test_what_is_lost_of_a_node_itself_is_called_its_result() -> None:
    for name, said in (("".join(["node", "_1"]), "its result"), ("other", "other, which is made of it,")):
        facts = NodeFacts("node_1", lost=Lost(name, 3.0, 20.0), outputs=(TensorFacts("node_1", absmax=1.0),))
        verdicts = [Storage(20.0)(facts)]
        assert verdicts[0] is not None
        assert said in verdicts[0].reason


@pytest.mark.parametrize("rows", [4, 20_000])
def test_the_batch_that_was_not_finite_is_the_one_that_is_named(rows: int) -> None:
    """Of small tensors, which are measured together, and of large ones."""
    x = torch.ones(rows, 8)
    program = torch.export.export(nn.ReLU(), (x,))
    with pytest.warns(UserWarning, match="batch 1"):
        frame = calibrate(program, [x, x * math.nan, x], progress=False, rounding_batches=0).frame
    assert set(frame["nonfinite_batch"]) == {1}
    assert set(calibrate(program, [x, x], progress=False, rounding_batches=0).frame["nonfinite_batch"]) == {None}
