"""The fuzz command: draws that repeat, a summary, and a failure told by the smallest program that shows it."""

import sys

import pytest
import torch
from calibcast.passes import cast_insertion, cast_sites, node_types

from benchmarks.fuzz import __main__ as command
from benchmarks.fuzz import judgement
from benchmarks.fuzz.judgement import NotExportedError, judge, shrunk
from benchmarks.fuzz.programs import KINDS, STEPS, Draw, Recipe, Step, drawn


def no_matmul(case):
    assert "matmul" not in str(case.program.graph), "there is a matmul"


@pytest.fixture
def broken_law(monkeypatch):
    """A law that any program with a matmul breaks."""
    monkeypatch.setattr(judgement, "LAWS", (no_matmul,))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fuzz", *arguments])
    return command.main(), capsys.readouterr().out


def test_a_draw_depends_on_its_seed_and_number_alone():
    assert drawn(0, 5) == drawn(0, 5)
    assert len({str(drawn(0, number)) for number in range(50)} | {str(drawn(1, number)) for number in range(50)}) == 100


def test_all_steps_and_kinds_of_plans_are_drawn():
    draws = [drawn(0, number) for number in range(2000)]
    assert {step.op for draw in draws for step in draw.recipe.steps} == set(STEPS)
    assert {draw.low_type for draw in draws} == {torch.float16, torch.bfloat16}
    assert {draw.coins is None for draw in draws} == {draw.recipe.dynamic for draw in draws} == {True, False}
    assert sum(len(steps) for steps in KINDS.values()) == len(STEPS)


def test_all_laws_hold_on_the_first_draws(monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "--graphs", "4", "--seed", "0")
    assert code == 0
    assert "4 graphs judged" in out
    assert "failures: 0" in out


def test_a_failure_is_told_by_the_smallest_program_and_the_way_to_repeat_it(monkeypatch, capsys, broken_law):
    number = next(n for n in range(1000) if "'matmul'" in str(drawn(0, n)) and len(drawn(0, n).recipe.steps) > 3)
    code, out = run(monkeypatch, capsys, "--seed", "0", "--only", str(number))
    assert code == 1
    assert "FAILED no_matmul: AssertionError: there is a matmul" in out
    assert f"repeat: python -m benchmarks.fuzz --seed 0 --only {number}" in out
    assert "failures: 1; no_matmul 1" in out
    assert "aten.matmul.default" in out


def test_shrinking_leaves_the_one_step_that_matters(broken_law):
    steps = (Step("relu", 0, 1), Step("add", 2, 0), Step("matmul", 1, 2), Step("tanh", 3, 3))
    draw = Draw(Recipe(steps, dynamic=True), -1, torch.float16)
    small = shrunk(judge(draw))
    assert [step.op for step in small.draw.recipe.steps] == ["matmul"]
    assert eval(str(small.draw), {**vars(sys.modules[Draw.__module__]), "torch": torch}) == small.draw


@pytest.mark.parametrize(
    ("place", "name", "broken", "step", "coins", "laws"),
    [
        # Casts that outlive a write; aliases that are not tied; dtype arguments that stay.
        (cast_sites._Walk, "_note_aliases", lambda self, call, made, given: None, "read_write_read", 0b11010,
         {"numbers_stay_close"}),
        (node_types, "ties_of", lambda graph_module: [], "split_write", 0b100, {"written_storage_has_one_type"}),
        (cast_insertion, "with_low_dtype", lambda node, args, kwargs, low: (args, kwargs), "zeros", -1,
         {"types_follow_the_plan", "comparison_agrees"}),
    ],
)  # fmt: skip
def test_the_laws_notice_what_insertion_must_not_forget(  # noqa: PLR0913
    monkeypatch, place, name, broken, step, coins, laws
):
    """Insertion with one thing left out breaks a law, on a program that keeps all of them as it is."""
    draw = Draw(Recipe((Step(step, 0, 1),)), coins, torch.float16)
    assert judge(draw) is None
    monkeypatch.setattr(place, name, broken)
    assert judge(draw).law in laws


def test_what_torch_cannot_export_is_counted_apart(monkeypatch, capsys):
    def refuse(recipe):
        raise RuntimeError("export says no")

    monkeypatch.setattr(judgement, "exported", refuse)
    with pytest.raises(NotExportedError, match="export says no"):
        judge(drawn(0, 0))
    code, out = run(monkeypatch, capsys, "--graphs", "3")
    assert code == 0
    assert "not exported by torch: 3" in out
