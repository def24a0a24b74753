"""`classify`: the user's lists and rules, what is kept, and that evidence decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import MismatchError, PlanError, RangeTable
from calibcast.calib import calibrate as measure
from calibcast.passes import NodeFacts, PrecisionPlan, Verdict, classify
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

aten = torch.ops.aten


class Net(nn.Module):
    """linear, relu, linear_1, add, softmax, linear_2, split and its getitems."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.head(torch.softmax(self.encoder(x) + x, -1)).split(2, -1)
        return first, second


class Scaled(nn.Module):
    """Multiplies by a buffer of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([value]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def batch(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program(export: Callable[..., ExportedProgram]) -> ExportedProgram:
    torch.manual_seed(0)
    return export(Net(), batch())


@pytest.fixture(scope="module")
def ranges(program: ExportedProgram) -> RangeTable:
    return calibrate(program, [batch()], progress=False)


EVERY = ("linear", "relu", "linear_1", "add", "softmax", "linear_2", "split")


def high_by(plan: PrecisionPlan, rule: str) -> set[str]:
    return {d.node for d in plan.decisions if d.precision == "high" and d.rule == rule}


class TestLists:
    @pytest.mark.parametrize(
        ("patterns", "high"),
        [
            ({"^linear$"}, {"linear"}),
            ({"linear"}, {"linear", "linear_1", "linear_2"}),
            ({r"encoder\.2"}, {"linear_1"}),
            ({"encoder"}, {"linear", "relu", "linear_1"}),
            (["head", "relu"], {"linear_2", "relu"}),
            ("softmax", {"softmax"}),
        ],
    )
    def test_exclude_by_node_name_and_module_path(
        self, program: ExportedProgram, ranges: RangeTable, patterns: Any, high: set[str]
    ) -> None:
        """`re.match` on the name of the node and on the path of its module; one pattern may be a bare string."""
        plan = classify(program, ranges, nodes_to_exclude=patterns)
        assert high_by(plan, "nodes_to_exclude") == high
        assert set(plan.low_precision_nodes) >= set(EVERY) - high - {"split"}

    @pytest.mark.parametrize(
        "target",
        [aten.add.Tensor, aten.add, "aten.add.Tensor", "aten.add", "torch.ops.aten.add.Tensor", "torch.ops.aten.add"],
    )
    def test_exclude_by_operator(self, program: ExportedProgram, ranges: RangeTable, target: Any) -> None:
        """An OpOverload, its packet, or the name of either, with or without `torch.ops.`; also without a list."""
        assert high_by(classify(program, ranges, targets_to_exclude={target}), "targets_to_exclude") == {"add"}
        assert high_by(classify(program, ranges, targets_to_exclude=target), "targets_to_exclude") == {"add"}

    def test_another_overload_is_another_operator(self, program: ExportedProgram) -> None:
        """`add.Scalar` is not in the graph, which is an error and no silence."""
        with pytest.raises(PlanError, match=r"no node has the target 'aten.add.Scalar'; near names: .*aten.add.Tensor"):
            classify(program, None, targets_to_exclude={aten.add.Scalar})

    @pytest.mark.parametrize("include", [{"nodes_to_include": {"linear"}}, {"targets_to_include": {aten.linear}}])
    def test_include_beats_exclude_and_every_rule(
        self, program: ExportedProgram, ranges: RangeTable, include: dict[str, Any]
    ) -> None:
        """Excluded by name and operator and above every limit, and yet low; the verdicts stay on record."""
        plan = classify(
            program,
            ranges,
            data_max=1e-3,
            init_max=1e-3,
            max_depth_of_reduction=1,
            nodes_to_exclude={"linear"},
            targets_to_exclude={"aten.linear"},
            **include,
        )
        assert plan.low_precision_nodes == ("linear", "linear_1", "linear_2", "split")  # split follows linear_2
        met = [v.rule for v in plan["linear"].verdicts]
        assert met == ["nodes_to_exclude", "targets_to_exclude", "data_max", "init_max", "max_depth_of_reduction"]
        assert "include list" in plan["linear"].reason

    def test_include_does_not_beat_legality(self, export: Callable[..., ExportedProgram]) -> None:
        """No target inverts matrices in half precision, whatever the user asks for."""
        program = export(lambda x: torch.linalg.inv(x) * 2, torch.eye(3))
        plan = classify(program, None, targets_to_include={"aten.linalg_inv"})
        assert plan["linalg_inv"].rule == "legality"
        assert plan["mul"].precision == "low"

    def test_custom_ops_are_high_unless_included(self, export: Callable[..., ExportedProgram]) -> None:
        """Of a custom op nothing is known."""
        program = export(lambda x: torch.ops.classification_tests.twice(x), batch())
        assert classify(program, None)["twice"].rule == "legality"
        plan = classify(program, None, targets_to_include={"classification_tests.twice"})
        assert plan.low_precision_nodes == ("twice",)

    @pytest.mark.parametrize(
        ("argument", "value", "message"),
        [
            ("nodes_to_exclude", {"linnear"}, r"nodes_to_exclude: 'linnear' matches no node .*near names: .*linear"),
            ("nodes_to_include", {"^sofmax$"}, r"nodes_to_include: '\^sofmax\$' matches no.*near names: softmax"),
            ("nodes_to_exclude", {"("}, r"nodes_to_exclude: '\(' is not a regular expression"),
            ("targets_to_exclude", {"aten.lineer"}, r"targets_to_exclude: no node has .*near names: .*aten.linear"),
            ("targets_to_include", {aten.conv2d.default}, r"no node has the target 'aten.conv2d.default'"),
        ],
    )
    def test_what_matches_nothing_is_an_error(
        self, program: ExportedProgram, argument: str, value: Any, message: str
    ) -> None:
        """A pattern or operator that matches nothing is a typing mistake; near names are listed."""
        with pytest.raises(PlanError, match=message):
            classify(program, None, **{argument: value})


@torch.library.custom_op("classification_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class TestSettings:
    @pytest.mark.parametrize(
        ("value", "dtype"),
        [
            (torch.float16, torch.float16),
            ("fp16", torch.float16),
            ("half", torch.float16),
            ("torch.bfloat16", torch.bfloat16),
            ("bf16", torch.bfloat16),
        ],
    )
    def test_low_types(self, program: ExportedProgram, value: Any, dtype: torch.dtype) -> None:
        """A dtype or its name."""
        assert classify(program, None, low_precision_type=value).low_precision_type == dtype

    @pytest.mark.parametrize("value", [torch.int8, "int8", torch.float32, torch.float8_e4m3fn, "float17", None])
    def test_other_types_are_errors(self, program: ExportedProgram, value: Any) -> None:
        """Integer and 8-bit types need quantisation."""
        with pytest.raises(PlanError, match=r"known are torch.float16 and torch.bfloat16"):
            classify(program, None, low_precision_type=value)

    @pytest.mark.parametrize("argument", ["data_max", "init_max", "max_depth_of_reduction"])
    @pytest.mark.parametrize("value", [-1, 0, math.nan, True])
    def test_limits_are_positive(self, program: ExportedProgram, argument: str, value: Any) -> None:
        """A limit that is no positive number says nothing; inf is how to switch a rule off."""
        with pytest.raises(PlanError, match=f"{argument}={value}: give a positive number, or inf"):
            classify(program, None, **{argument: value})

    @pytest.mark.parametrize("value", [0.0, -0.5, 1.5, math.nan])
    def test_quantiles_are_shares(self, program: ExportedProgram, value: float) -> None:
        """Above 0 and at most 1."""
        with pytest.raises(PlanError, match="range_quantile"):
            classify(program, None, range_quantile=value)

    def test_quantiles_need_histograms(self, program: ExportedProgram) -> None:
        """Without histograms only the peak is known; asking for less is an error and no guess."""
        plain = calibrate(program, [batch()], histogram=False, progress=False)
        with pytest.raises(PlanError, match=r"range_quantile=0.99 needs histograms"):
            classify(program, plain, range_quantile=0.99)
        assert classify(program, plain).low_precision_nodes

    def test_a_quantile_forgives_outliers(self, export: Callable[..., ExportedProgram]) -> None:
        """One value of 1000 among 4096 keeps a node high by its peak, and not by its 0.999 quantile."""
        x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
        x[0] = 1000.0
        program = export(torch.tanh, x)
        ranges = calibrate(program, [x], progress=False)
        assert high_by(classify(program, ranges), "data_max") == {"tanh"}
        decision = classify(program, ranges, range_quantile=0.999)["tanh"]
        assert decision.precision == "low"
        assert "within data_max" not in decision.reason

    def test_infinity_switches_data_max_off(self, program: ExportedProgram) -> None:
        """With data_max=inf magnitudes alone keep nothing high."""
        ranges = calibrate(program, [batch(1000)], progress=False)
        assert high_by(classify(program, ranges), "data_max")
        assert high_by(classify(program, ranges, data_max=math.inf), "data_max") == set()

    def test_init_max_is_the_low_type_by_default(self, export: Callable[..., ExportedProgram]) -> None:
        """A buffer of 3000 is no overflow in fp16; one of 70000 is, and not in bf16."""
        x = batch()
        for value, low_type, rule in [(3e3, "fp16", None), (7e4, "fp16", "init_max"), (7e4, "bf16", None)]:
            program = export(Scaled(value), x)
            ranges = calibrate(program, [x], progress=False)
            plan = classify(program, ranges, low_type, data_max=math.inf)
            assert high_by(plan, "init_max") == ({"mul"} if rule else set())


class TestWithoutRanges:
    def test_it_works_and_says_so(self, program: ExportedProgram) -> None:
        """Only rules that need no ranges apply, and the plan says that nothing is known of overflow."""
        plan = classify(program, None)
        assert plan.low_precision_nodes == EVERY
        assert "no ranges were given" in plan.notes[0]
        assert "no ranges were given" in str(plan)
        assert plan["linear"].reason == "no rule that needs no ranges is met; none was given"
        assert (plan["linear"].evidence, plan["linear"].limit) == (None, None)

    def test_rules_that_need_none_apply(self, program: ExportedProgram, export: Callable[..., Any]) -> None:
        """The user's lists, literals and depths stand in the graph."""
        assert classify(program, None, nodes_to_exclude={"relu"})["relu"].rule == "nodes_to_exclude"
        literal = export(lambda x: x * 1e-12 + 1e-12, batch())
        assert high_by(classify(literal, None), "literal") == {"mul", "add"}

    def test_ranges_of_another_program_are_refused(self, export: Callable[..., Any], ranges: RangeTable) -> None:
        """Ranges belong to the graph that they were measured on; the first difference is named."""
        other = export(lambda x: torch.tanh(x), batch())
        with pytest.raises(MismatchError, match="belong to another program"):
            classify(other, ranges)

    def test_other_weights_warn_or_are_refused(self, export: Callable[..., Any], ranges: RangeTable) -> None:
        """The same graph with other weights has other ranges."""
        torch.manual_seed(1)
        other = export(Net(), batch())
        with pytest.warns(UserWarning, match="other weights"):
            classify(other, ranges)
        with pytest.raises(MismatchError, match="other weights"):
            classify(other, ranges, weights="refuse")
        assert classify(other, ranges, weights="ignore").low_precision_nodes

    def test_an_unmeasured_node_stays_high(self, program: ExportedProgram, ranges: RangeTable) -> None:
        """A row that lacks from a table is missing evidence, and its readers miss it too."""
        partial = RangeTable(ranges.frame.filter(pl.col("node") != "relu"), ranges.calibration)
        assert high_by(classify(program, partial), "unmeasured") == {"relu", "linear_1"}


@dataclass(frozen=True)
class NoSoftmax:
    """A user's rule with a field of its own."""

    reason: str = "we saw it drift"

    def __call__(self, facts: NodeFacts) -> Verdict | None:
        return Verdict("no_softmax", self.reason, 1.0, 0.5) if facts.base == "softmax" else None


class TestUserRules:
    def test_a_dataclass_and_a_function(self, program: ExportedProgram, ranges: RangeTable) -> None:
        """Each is called with the facts of a node; what it answers keeps the node high, with its numbers."""

        def wide(facts: NodeFacts) -> Verdict | None:
            return Verdict("wide", "it has 8 inputs", float(facts.depth)) if facts.depth == 8 else None

        plan = classify(program, ranges, rules=[NoSoftmax(), wide])
        assert (plan["softmax"].rule, plan["softmax"].evidence, plan["softmax"].limit) == ("no_softmax", 1.0, 0.5)
        assert high_by(plan, "wide") == {"linear", "linear_1", "linear_2"}
        assert plan["softmax"].verdicts[1].rule == "wide"
        assert {"no_softmax", "wide"} <= set(plan.settings["rules"])

    def test_facts_tell_what_was_measured(self, program: ExportedProgram, ranges: RangeTable) -> None:
        """A rule sees inputs by name with kind, range and decision, and the module of the node."""
        seen: dict[str, NodeFacts] = {}
        classify(program, ranges, rules=[lambda facts: seen.setdefault(facts.name, facts) and None])
        facts = seen["linear_1"]
        assert [(t.name, t.kind, t.precision) for t in facts.inputs] == [
            ("relu", "activation", "low"),
            ("p_encoder_2_weight", "parameter", None),
            ("p_encoder_2_bias", "parameter", None),
        ]
        row = ranges.frame.row(by_predicate=pl.col("node") == "linear_1", named=True)
        assert (facts.outputs[0].absmax, facts.outputs[0].min) == (row["absmax"], row["min"])
        assert (facts.module, facts.op, facts.base, facts.depth) == ("encoder.2", "aten.linear.default", "linear", 8)
        assert "split" in seen
        assert seen["split"].moves

    def test_a_rule_that_raises_is_named(self, program: ExportedProgram) -> None:
        """The error names rule, node and cause."""

        def broken(facts: NodeFacts) -> Verdict | None:
            raise ValueError("no luck")

        with pytest.raises(PlanError, match="rule broken raised ValueError on node linear: no luck"):
            classify(program, None, rules=[broken])

    @pytest.mark.parametrize("answer", [True, "high", False])
    def test_a_rule_that_answers_something_else_is_an_error(self, program: ExportedProgram, answer: Any) -> None:
        """A rule answers a Verdict or None; False is neither."""
        with pytest.raises(PlanError, match=r"answered .* on node linear; a rule answers a Verdict or None"):
            classify(program, None, rules=[lambda facts: answer])


class TestVerdicts:
    def test_all_verdicts_are_kept(self, export: Callable[..., Any]) -> None:
        """A node that meets four rules names the first and keeps them all, in the order of the rules."""
        x = batch(1000)
        program = export(lambda x: x + 100000.0, x)
        ranges = calibrate(program, [x], progress=False)
        decision = classify(program, ranges, nodes_to_exclude={"add"})["add"]
        assert decision.rule == "nodes_to_exclude"
        assert [v.rule for v in decision.verdicts] == ["nodes_to_exclude", "data_max", "literal", "storage"]

    def test_low_nodes_tell_their_margin(self, program: ExportedProgram, ranges: RangeTable) -> None:
        """A low node has no rule; its evidence is the largest magnitude seen, of activations only."""
        decision = classify(program, ranges)["softmax"]
        table = dict(ranges.frame.select("node", "absmax").rows())
        assert (decision.rule, decision.verdicts) == (None, ())
        assert (decision.evidence, decision.limit) == (max(table["add"], table["softmax"]), 512.0)
        assert "within data_max 512" in decision.reason

    def test_a_movement_beyond_data_max_claims_nothing_false(self, export: Callable[..., Any]) -> None:
        """A view of an included node is low above data_max, and does not claim to be within it."""
        x = batch(1000)
        program = export(lambda x: (x * 2).view(-1), x)
        plan = classify(program, calibrate(program, [x], progress=False), nodes_to_include={"mul"})
        assert plan["view"].precision == "low"
        assert "within" not in plan["view"].reason


class TestKept:
    def test_what_is_not_ours_to_type(self, export: Callable[..., Any]) -> None:
        """Integers, getitem, float64, complex, half, stated types and bits are kept, each saying why."""

        def forward(x: torch.Tensor, ids: torch.Tensor) -> tuple[Any, ...]:
            top, _ = x.topk(2)
            wave = torch.view_as_complex(x.reshape(-1, 4, 2)).abs()
            bits = (x * 2).view(torch.int32)
            return ids + 1, top, x.double() * 2, wave, x.half() * 2, bits

        plan = classify(export(forward, batch(), torch.arange(3)), None)
        kept = {(d.op.split(".")[1] if "." in d.op else d.op, d.rule) for d in plan.decisions if d.precision == "kept"}
        assert kept >= {
            ("add", "integer"),
            ("getitem", "getitem"),
            ("mul", "float64"),
            ("mul", "already_low"),
            ("to", "stated_type"),
            ("view_as_complex", "complex"),
            ("abs", "complex"),
            ("view", "bitcast"),
        }

    def test_bits_keep_the_type_whose_bits_they_are(self, export: Callable[..., Any]) -> None:
        """`x.view(torch.int32)` is kept even where all around it is low: other bits are another number."""
        plan = classify(export(lambda x: (x * 2).view(torch.int32) >> 23, batch()), None)
        assert (plan["view"].precision, plan["view"].rule) == ("kept", "bitcast")
        assert plan.low_precision_nodes == ("mul",)

    def test_autocast_regions_are_kept_with_what_is_in_them(self, export: Callable[..., Any]) -> None:
        """A region has a row, and so has each node in it, under its qualified name."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = x @ x
            return inside.float() + x

        plan = classify(export(forward, torch.eye(4)), None)
        assert {d.node: d.rule for d in plan.decisions}["submod_1.matmul"] == "autocast_region"
        assert plan.low_precision_nodes == ("add",)

    def test_a_write_into_a_buffer_keeps_its_class_high(self, export: Callable[..., Any]) -> None:
        """Storage that a write shows in a buffer keeps the buffer's type, and every node of the class says so."""

        class Counter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("total", torch.zeros(8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.total.add_(x.sum(0))
                return x + self.total

        plan = classify(export(Counter(), batch()), None)
        assert high_by(plan, "alias") == {"add_"}
        assert plan["add_"].reason == "an in-place op writes into b_total, which keeps its type"
        assert plan.low_precision_nodes == ("sum_1", "add")

    def test_one_high_node_ties_all_that_share_its_storage(self, export: Callable[..., Any]) -> None:
        """A write through a view: what shares the storage is high when one of it is, unlike a mere reader."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[:, :2].add_(1.0)
            return torch.tanh(y)

        program = export(forward, batch())
        plan = classify(program, None, nodes_to_exclude={"mul"})
        assert {d.node: d.rule for d in plan.decisions if d.precision == "high"} == {
            "mul": "nodes_to_exclude",
            "slice_1": "follows",
            "add_": "alias",
        }
        assert plan["add_"].reason == "it shares storage, written in place, with mul, which is high"
        assert plan.low_precision_nodes == ("tanh",)
        assert classify(program, None).high_precision_nodes == ()

    def test_a_kept_alias_ties_too(self, export: Callable[..., Any]) -> None:
        """`.to(float32)` of an fp32 tensor is the tensor itself: what is written through it stays fp32."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            view = y.view(-1)
            y.to(torch.float32).add_(1.0)
            return view * 3

        plan = classify(export(forward, batch()), None)
        assert plan["to"].precision == "kept"
        assert high_by(plan, "alias") == {"mul", "view", "add_"}
        assert plan["mul"].reason == "it shares storage, written in place, with to, which keeps its type"
        assert plan.low_precision_nodes == ("mul_1",)


class Ladder(nn.Module):
    """Ops of all kinds whose evidence grows with the input: directly, squared, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.linear(x)
        normed = self.norm(product)
        bent = torch.tanh(normed) * 3
        turned = product.view(-1, 4, 8).transpose(1, 2)
        return bent + turned.transpose(1, 2).reshape(-1, 8).relu()


def expected_low(program: ExportedProgram, ranges: RangeTable, data_max: float) -> set[str]:
    """The low nodes of `Ladder`, worked out from the frame: peaks, the sum of squares of a norm, and movements."""
    peaks = dict(ranges.frame.select("node", "absmax").rows())
    kinds = dict(ranges.frame.select("node", "kind").rows())
    low: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            inputs = [n.name for n in node.all_input_nodes if kinds[n.name] in {"input", "activation"}]
            if _moves(node):
                is_low = inputs[0] in low
            else:
                hidden = 8 * peaks[inputs[0]] ** 2 if "layer_norm" in node.name else 0.0
                is_low = max(peaks[n] for n in [*inputs, node.name]) <= data_max and hidden <= 65504
            low |= {node.name} if is_low else set()
    return low


def _moves(node: fx.Node) -> bool:
    return node.name.startswith(("view", "transpose", "reshape"))


class TestEvidence:
    @pytest.fixture(scope="class")
    @staticmethod
    def ladder(export: Callable[..., ExportedProgram]) -> tuple[ExportedProgram, RangeTable, RangeTable]:
        """One program, calibrated on x and on 1000 x."""
        torch.manual_seed(0)
        program = export(Ladder(), batch())
        return program, *(calibrate(program, [batch(scale)], progress=False) for scale in (1.0, 1000.0))

    def test_plans_differ_where_evidence_crossed_a_limit(
        self, ladder: tuple[ExportedProgram, RangeTable, RangeTable]
    ) -> None:
        """Inputs a thousand times larger give another plan, at just those nodes whose numbers crossed a limit."""
        program, small, large = ladder
        plans = [set(classify(program, table).low_precision_nodes) for table in (small, large)]
        wanted = [expected_low(program, table, 512.0) for table in (small, large)]
        assert plans[0] ^ plans[1] == wanted[0] ^ wanted[1]
        assert plans == wanted
        assert plans[0] == {n.name for n in program.graph.nodes if n.op == "call_function"}
        assert plans[1] == {"tanh", "mul"}

    @seed(0)
    @settings(max_examples=60, deadline=None)
    @given(limits=st.tuples(*[st.floats(1e-3, 1e5) | st.just(math.inf)] * 2), large=st.booleans())
    def test_raising_data_max_never_moves_a_node_from_low_to_high(
        self, ladder: tuple[ExportedProgram, RangeTable, RangeTable], limits: tuple[float, float], large: bool
    ) -> None:
        """What is low under a limit is low under a higher one, movements and ties included."""
        program, table = ladder[0], ladder[2 if large else 1]
        plans = [classify(program, table, data_max=limit) for limit in sorted(limits)]
        stricter, looser = (set(plan.low_precision_nodes) for plan in plans)
        assert stricter <= looser

    @pytest.mark.parametrize("data_max", [1.0, 2.5, 100.0, 3000.0])
    def test_every_threshold_is_held_strictly(
        self, ladder: tuple[ExportedProgram, RangeTable, RangeTable], data_max: float
    ) -> None:
        """At any threshold the plan is what the frame says; at the very number seen, the node is low."""
        program, small, large = ladder
        for table in (small, large):
            assert set(classify(program, table, data_max=data_max).low_precision_nodes) == expected_low(
                program, table, data_max
            )
        peak = max(classify(program, small)["tanh"].evidence, 1e-3)
        assert classify(program, small, data_max=peak)["tanh"].precision == "low"
        below = math.nextafter(peak, 0)
        assert classify(program, small, data_max=below)["tanh"].verdicts[0].evidence == peak

    def test_nonfinite_evidence_keeps_readers_high(self, export: Callable[..., ExportedProgram]) -> None:
        """An Inf that fp32 itself makes keeps its producer and its readers high, with the batch that did it."""
        program = export(lambda x: (1 / x).tanh(), batch())
        with pytest.warns(UserWarning, match="NaN or Inf"):
            ranges = calibrate(program, [batch(), torch.zeros(16, 8)], progress=False)
        plan = classify(program, ranges, data_max=math.inf)
        assert high_by(plan, "nonfinite") == set(plan.high_precision_nodes) != set()
        assert "first in batch 1" in plan["tanh"].reason

    def test_an_offset_is_seen_and_a_weight_is_not(self, export: Callable[..., ExportedProgram]) -> None:
        """Temperatures around 400 lose their signal in fp16: the nodes that touch them stay high."""
        x = 400 + 0.05 * torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
        program = export(lambda x: torch.tanh((x - 400.0) * 4.0), x)
        plan = classify(program, calibrate(program, [x], progress=False))
        assert high_by(plan, "storage") == {"sub"}
        assert plan.low_precision_nodes == ("mul", "tanh")


def test_order_is_that_of_the_graph(program: ExportedProgram, ranges: RangeTable) -> None:
    """low_precision_nodes and high_precision_nodes are tuples in graph order, without kept nodes."""
    plan = classify(program, ranges, nodes_to_exclude={"relu", "softmax"})
    assert plan.low_precision_nodes == ("linear", "linear_1", "add", "linear_2", "split")
    assert plan.high_precision_nodes == ("relu", "softmax")
    names = [n.name for n in program.graph.nodes if n.op == "call_function"]
    assert [d.node for d in plan.decisions] == names
    assert [d.node for d in plan.decisions if d.precision == "kept"] == ["getitem", "getitem_1"]


def test_the_program_is_left_alone(program: ExportedProgram, ranges: RangeTable) -> None:
    """Deciding changes nothing of the graph."""
    before = str(program.graph)
    classify(program, ranges, nodes_to_exclude={"relu"})
    assert str(program.graph) == before


def test_functional_graphs_are_decided_too(export: Callable[..., ExportedProgram]) -> None:
    """After `run_decompositions` the same evidence holds the same operators."""
    program = export(lambda x: F.relu(x) * 600, batch()).run_decompositions()
    plan = classify(program, calibrate(program, [batch()], progress=False))
    assert (plan["relu"].precision, plan["mul"].rule) == ("low", "data_max")
