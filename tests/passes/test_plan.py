"""The precision plan as a thing to read, save and carry over: columns, sentences, files, present types."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, MismatchError, PlanError
from calibcast.calib import calibrate as measure
from calibcast.passes import PrecisionPlan, classify, insert_casts
from calibcast.passes.plan import SCHEMA
from torch import nn
from torch.export import ExportedProgram

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)


class Net(nn.Module):
    """linear, mul by a literal that fp16 does not hold, topk, getitem."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.head.weight.data.fill_(0.01)
        self.head.weight.data[0, 0], self.head.weight.data[0, 1] = 1e5, 1e-9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(torch.relu(x)) * 1e5).topk(2).values


@pytest.fixture(scope="module")
def program(export: Callable[..., ExportedProgram]) -> ExportedProgram:
    torch.manual_seed(0)
    return export(Net(), torch.randn(4, 8))


@pytest.fixture(scope="module")
def plan(program: ExportedProgram) -> PrecisionPlan:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    return classify(program, calibrate(program, [x], progress=False), nodes_to_exclude={"mul"})


def test_frame_has_a_row_per_node(plan: PrecisionPlan) -> None:
    """Columns and types are the contract; null stands for what does not apply."""
    assert plan.frame.schema == pl.Schema(SCHEMA)
    assert plan.frame["node"].to_list() == ["relu", "linear", "mul", "topk", "getitem", "getitem_1"]
    rows = {row["node"]: row for row in plan.frame.iter_rows(named=True)}
    assert (rows["relu"]["precision"], rows["relu"]["rule"], rows["relu"]["limit"]) == ("low", None, 512.0)
    assert rows["linear"]["op"] == "aten.linear.default"
    assert (rows["linear"]["module"], rows["linear"]["work"]) == ("head", 2 * 4 * 8 * 4)
    assert (rows["getitem"]["precision"], rows["getitem"]["rule"]) == ("kept", "getitem")
    assert rows["relu"]["verdicts"] == []
    assert rows["mul"]["verdicts"][0] == {
        "rule": "nodes_to_exclude",
        "reason": "it matches nodes_to_exclude 'mul'",
        "evidence": None,
        "limit": None,
    }
    assert [v["rule"] for v in rows["mul"]["verdicts"]][:3] == ["nodes_to_exclude", "data_max", "literal"]


def test_explain_tells_each_kind_of_decision(plan: PrecisionPlan) -> None:
    """A sentence with the place, the type, the reason and its numbers; of a high node every reason."""
    assert plan.explain("relu").startswith("relu (aten.relu.default) runs in float16: its largest magnitude is ")
    linear = plan.explain("linear")
    assert linear.startswith("linear (aten.linear.default, head) stays in its exported type (data_max): its output")
    assert "Also (init_max): its parameter p_head_weight reached 1e+05, above init_max 65504." in linear
    assert "Also (literal): its literal other=100000 becomes inf in fp16." in plan.explain("mul")
    assert plan.explain("getitem") == "getitem (getitem) is kept as it is: it only picks one of several outputs."


def test_unknown_nodes_are_named_with_near_ones(plan: PrecisionPlan) -> None:
    """A mistyped name is an error that lists near names."""
    for ask in (plan.explain, plan.__getitem__):
        with pytest.raises(PlanError, match=r"the plan has no node 'lineer'; near names: .*linear"):
            ask("lineer")


def test_str_is_a_compact_table(plan: PrecisionPlan) -> None:
    """Counts by precision and rule, the shares of nodes and of work, and the notes."""
    lines = str(plan).splitlines()
    assert lines[0] == "PrecisionPlan: 1 float16, 3 high, 2 kept; 25.0% of nodes and 0.0% of work in low precision"
    assert lines[0] == plan.summary
    assert lines[1].split() == ["precision", "rule", "nodes"]
    assert [line.split() for line in lines[2:6]] == [
        ["low", "1"],
        ["high", "data_max", "2"],
        ["high", "nodes_to_exclude", "1"],
        ["kept", "getitem", "2"],
    ]
    assert len(lines) <= 9


def test_weights_that_become_inf_or_zero_are_named(plan: PrecisionPlan) -> None:
    """A value that the low type makes inf or zero is told, by the name of its weight."""
    assert plan.notes == (
        "parameter p_head_weight has values up to 1e+05: inf in float16",
        "parameter p_head_weight has values down to 1e-09: zero in float16",
    )


def test_shares_of_nothing_are_not_numbers(export: Callable[..., ExportedProgram]) -> None:
    """A program with integers only has no share, and no error."""
    plan = classify(export(lambda i: i * 2, torch.arange(3)), None)
    assert all(math.isnan(share) for share in plan.share())
    assert "- of nodes and - of work in low precision" in str(plan)


class TestFiles:
    @pytest.mark.parametrize("low_type", ["float16", "bfloat16"])
    def test_round_trip(self, program: ExportedProgram, tmp_path: Path, low_type: str) -> None:
        """A plan comes back equal: decisions, verdicts, settings, notes, and it fits its program."""
        plan = classify(program, None, low_type, data_max=math.inf, nodes_to_exclude={"relu"}, max_depth_of_reduction=3)
        plan.save(tmp_path / "plan.json")
        loaded = PrecisionPlan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert loaded.frame.equals(plan.frame)
        assert loaded.fingerprint == plan.fingerprint
        assert loaded.settings["data_max"] == math.inf
        loaded.check(program)
        assert str(insert_casts(program, loaded).graph) == str(insert_casts(program, plan).graph)

    def test_with_evidence(self, plan: PrecisionPlan, tmp_path: Path) -> None:
        """Numbers come back to the last bit."""
        plan.save(tmp_path / "plan.json")
        assert PrecisionPlan.load(tmp_path / "plan.json") == plan

    def test_a_missing_file(self, tmp_path: Path) -> None:
        """The message names the file."""
        with pytest.raises(ArtifactError, match=r"plan.json: no such file"):
            PrecisionPlan.load(tmp_path / "plan.json")

    @pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
    def test_a_truncated_file(self, plan: PrecisionPlan, tmp_path: Path, part: float) -> None:
        """However much is missing, it is no plan."""
        path = tmp_path / "plan.json"
        plan.save(path)
        text = path.read_text()
        path.write_text(text[: int(part * len(text))])
        with pytest.raises(ArtifactError, match=r"plan.json"):
            PrecisionPlan.load(path)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 1}', "no json", "null"])
    def test_a_foreign_file(self, tmp_path: Path, content: str) -> None:
        """What calibcast has not written is refused."""
        path = tmp_path / "plan.json"
        path.write_text(content)
        with pytest.raises(ArtifactError, match="plan"):
            PrecisionPlan.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, "written by a newer calibcast"),
            ({"schema": "1"}, "written by another calibcast"),
            ({"calibcast": "ranges"}, "is a calibcast ranges file; expected a plan file"),
            ({"decisions": None}, "claims to be a plan file"),
            ({"decisions": [{"node": "x"}]}, "claims to be a plan file"),
            ({"low_precision_type": "int8"}, "claims to be a plan file"),
            ({"digests": None}, "claims to be a plan file"),
        ],
    )
    def test_another_version_or_shape(
        self, plan: PrecisionPlan, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        """Another schema, another kind, or fields that are not what they claim to be: each is told."""
        path = tmp_path / "plan.json"
        plan.save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ArtifactError, match=message):
            PrecisionPlan.load(path)

    def test_an_unknown_precision(self, plan: PrecisionPlan, tmp_path: Path) -> None:
        """A precision that this version does not know is refused, and not read as high."""
        path = tmp_path / "plan.json"
        plan.save(path)
        document = json.loads(path.read_text())
        document["decisions"][0]["precision"] = "lowest"
        path.write_text(json.dumps(document))
        with pytest.raises(ArtifactError, match="unknown precision 'lowest'"):
            PrecisionPlan.load(path)

    def test_writing_leaves_no_part_behind(self, plan: PrecisionPlan, tmp_path: Path) -> None:
        """A folder that is missing is an error; a folder that is there holds the plan alone."""
        with pytest.raises(ArtifactError, match="cannot write"):
            plan.save(tmp_path / "missing" / "plan.json")
        plan.save(tmp_path / "plan.json")
        plan.save(tmp_path / "plan.json")
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


class TestFitting:
    def test_a_plan_of_another_program_is_refused(
        self, plan: PrecisionPlan, export: Callable[..., ExportedProgram]
    ) -> None:
        """A plan is for one graph; the first difference is named."""
        other = export(lambda x: torch.relu(x) * 2, torch.randn(4, 8))
        with pytest.raises(MismatchError, match="this plan is for another program: node"):
            insert_casts(other, plan)

    def test_a_plan_fits_the_program_saved_and_loaded(
        self, program: ExportedProgram, plan: PrecisionPlan, tmp_path: Path
    ) -> None:
        """Saving and loading the program changes nothing that a plan knows it by."""
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        plan.check(loaded)
        assert str(insert_casts(loaded, plan).graph) == str(insert_casts(program, plan).graph)

    def test_a_plan_fits_another_export_of_the_model(self, export: Callable[..., Any], plan: PrecisionPlan) -> None:
        """Exported again with the same sizes, the model is the same program."""
        plan.check(export(Net(), torch.randn(4, 8)))
        with pytest.raises(MismatchError, match="shape"):
            plan.check(export(Net(), torch.randn(5, 8)))


class TestFromTypes:
    def test_present_types_are_read_back(self, program: ExportedProgram, plan: PrecisionPlan) -> None:
        """Of a rewritten program, each node at the type that it runs in; casts are stated types."""
        present = PrecisionPlan.from_types(insert_casts(program, plan))
        assert present.low_precision_nodes == ("relu",)
        assert present.high_precision_nodes == ("linear", "mul", "topk")
        assert present["x_as_float16"].rule == "stated_type"
        assert present["relu"].reason == "the program has it in float16"

    def test_the_more_frequent_low_type_is_the_plans(self, export: Callable[..., ExportedProgram]) -> None:
        """A program with more bf16 than fp16 has a bf16 plan, in which fp16 is kept."""
        program = export(lambda x: (x.bfloat16() * 2 + 1).float() + x.half().relu().float(), torch.randn(3))
        present = PrecisionPlan.from_types(program)
        assert present.low_precision_type == torch.bfloat16
        assert present.low_precision_nodes == ("mul", "add")
        assert (present["relu"].precision, present["relu"].rule) == ("kept", "present_type")

    def test_a_program_in_fp32_is_all_high(self, program: ExportedProgram) -> None:
        """Nothing to do: inserting it gives the program."""
        present = PrecisionPlan.from_types(program)
        assert present.low_precision_nodes == ()
        assert present.high_precision_nodes == ("relu", "linear", "mul", "topk")
        assert str(insert_casts(program, present).graph) == str(program.graph)


def test_damaged_plans_never_raise_anything_else(plan: PrecisionPlan, tmp_path: Path) -> None:
    """Whatever bytes are wrong, loading gives an ArtifactError, or a plan for the nodes of the graph alone."""
    plan.save(tmp_path / "plan.json")
    whole, generator = (tmp_path / "plan.json").read_bytes(), random.Random(4)
    refused = 0
    for _ in range(800):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            at = generator.randrange(len(content))
            content[at : at + generator.choice([0, 1])] = generator.randbytes(generator.choice([0, 1, 1]))
        (tmp_path / "plan.json").write_bytes(content)
        try:
            loaded = PrecisionPlan.load(tmp_path / "plan.json")
            assert {decision.node for decision in loaded.decisions} <= loaded.digests.keys()
            assert str(loaded)
        except ArtifactError:
            refused += 1
    assert refused > 400


def test_a_node_that_the_graph_lacks_is_refused(plan: PrecisionPlan, tmp_path: Path) -> None:
    """A decision on no node would leave the node that it was for in fp32 without a word."""
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text().replace('"node": "linear"', '"node": "liNear"')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"plan\.json decides on node 'liNear', which the graph .* does not have"):
        PrecisionPlan.load(tmp_path / "plan.json")
