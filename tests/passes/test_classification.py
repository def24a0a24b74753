"""`classify`: lists, limits and evidence; what the plan then says."""

import json
import re
from dataclasses import dataclass

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from calib import ArtifactError, MismatchError, PlanError, calibrate
from passes import PrecisionPlan, Verdict, classify


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Net(nn.Module):
    """linear, relu (in `inner`), then linear_1, mul, view, add, and a norm that is illegal."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        y = self.head(self.inner(x)) * 50.0
        y = y.view(-1, 3, 2) + 1.0
        return y, torch.linalg.inv(torch.eye(2) + 0.001 * (y.transpose(1, 2) @ y))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.randn(4, 6),))


def batches(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(4, 6, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def ranges(program):
    return calibrate(program, batches(), progress=False)


def rules_of(plan):
    return {decision.node: decision.rule for decision in plan.decisions}


class TestEvidenceDecides:
    def test_data_a_thousand_times_larger_moves_exactly_the_nodes_that_crossed(self, program):
        small, large = (calibrate(program, batches(scale), progress=False) for scale in (1.0, 1000.0))
        plans = [classify(program, table, data_max=2000.0) for table in (small, large)]
        moved = {
            d.node for d, e in zip(plans[0].decisions, plans[1].decisions, strict=True) if d.precision != e.precision
        }
        assert moved
        peaks = [dict(table.frame.select("node", "absmax").rows()) for table in (small, large)]
        nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
        for name, node in nodes.items():
            own = [name, *(argument.name for argument in node.all_input_nodes)]
            activations = [n for n in own if n in peaks[0] and not n.startswith("p_")]
            crossed = [n for n in activations if peaks[0][n] <= 2000.0 < peaks[1][n]]
            verdicts = [{v.rule for v in plan[name].verdicts} for plan in plans]
            if name in moved:
                new = verdicts[1] - verdicts[0]
                assert new
                assert new <= {"data_max", "interior", "storage", "follows"}
                assert crossed or new & {"interior", "storage", "follows"}
            if "data_max" in verdicts[1] - verdicts[0]:
                assert crossed

    @settings(max_examples=25, deadline=None)
    @given(limits=st.lists(st.floats(0.01, 1e5), min_size=2, max_size=2))
    def test_raising_data_max_never_moves_a_node_from_low_to_high(self, program, ranges, limits):
        low, high = sorted(limits)
        before = classify(program, ranges, data_max=low, weights="ignore")
        after = classify(program, ranges, data_max=high, weights="ignore")
        assert set(before.low_precision_nodes) <= set(after.low_precision_nodes)

    def test_a_node_that_was_not_measured_stays_high_and_says_so(self, program, ranges):
        fewer = type(ranges)(ranges.frame.filter(pl.col("node") != "relu"), ranges.calibration)
        plan = classify(program, fewer)
        assert rules_of(plan)["relu"] == "unmeasured"
        assert rules_of(plan)["linear_1"] == "unmeasured"  # it reads relu
        assert "calibration has not measured relu" in plan.explain("relu")

    def test_without_ranges_the_plan_says_what_it_does_not_know(self, program):
        plan = classify(program, None)
        assert "nothing is known of overflow" in str(plan)
        assert {"unmeasured", "data_max"}.isdisjoint(rules_of(plan).values())
        assert rules_of(plan)["linalg_inv"] == "legality"

    def test_nan_in_fp32_keeps_a_node_high(self, program):
        data = batches()
        data[1][0, 0] = float("nan")
        with pytest.warns(UserWarning, match="batch 1 at node x"):
            table = calibrate(program, data, progress=False)
        assert rules_of(classify(program, table))["linear"] == "nonfinite"


class TestLists:
    @pytest.mark.parametrize(
        ("arguments", "nodes"),
        [
            ({"nodes_to_exclude": {"^linear$"}}, {"linear": "nodes_to_exclude"}),
            ({"nodes_to_exclude": ["linear"]}, {"linear": "nodes_to_exclude", "linear_1": "nodes_to_exclude"}),
            ({"nodes_to_exclude": "inner"}, {"linear": "nodes_to_exclude", "relu": "nodes_to_exclude"}),
            ({"targets_to_exclude": {torch.ops.aten.relu.default}}, {"relu": "targets_to_exclude"}),
            ({"targets_to_exclude": [torch.ops.aten.relu]}, {"relu": "targets_to_exclude"}),
            ({"targets_to_exclude": ["aten.relu.default"]}, {"relu": "targets_to_exclude"}),
            ({"targets_to_exclude": ["torch.ops.aten.relu"]}, {"relu": "targets_to_exclude"}),
        ],
    )
    def test_what_is_excluded(self, program, ranges, arguments, nodes):
        plan = rules_of(classify(program, ranges, **arguments))
        assert {name: plan[name] for name in nodes} == nodes
        assert sum(rule in {"nodes_to_exclude", "targets_to_exclude"} for rule in plan.values()) == len(nodes)

    def test_include_beats_exclude_and_every_rule_but_legality(self, program, ranges):
        plan = classify(
            program, ranges, data_max=0.001, nodes_to_exclude={"linear"}, nodes_to_include={"^linear$", "linalg"},
            targets_to_include={torch.ops.aten.relu.default},
        )  # fmt: skip
        assert {"linear", "relu"} <= set(plan.low_precision_nodes)
        assert rules_of(plan)["linear_1"] == "nodes_to_exclude"
        assert rules_of(plan)["linalg_inv"] == "legality"
        kept = {verdict.rule for verdict in plan["linear"].verdicts}
        assert {"nodes_to_exclude", "data_max"} <= kept  # no reason is lost
        assert "include list" in plan.explain("linear")

    def test_all_verdicts_are_kept_with_their_numbers(self, program, ranges):
        plan = classify(program, ranges, data_max=0.001, nodes_to_exclude={"^linear$"})
        first, second = plan["linear"].verdicts[:2]
        assert (first.rule, second.rule) == ("nodes_to_exclude", "data_max")
        assert second.limit == 0.001
        assert second.evidence > 0.001
        assert "Also (data_max)" in plan.explain("linear")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"nodes_to_exclude": ["^linaer"]},
                r"nodes_to_exclude: '\^linaer' matches no node name.*near names: linear",
            ),
            ({"nodes_to_include": ["nothing_like_it"]}, "nodes_to_include: 'nothing_like_it' matches no"),
            ({"nodes_to_exclude": ["("]}, "is not a regular expression"),
            (
                {"targets_to_exclude": ["aten.relu6.default"]},
                r"no node has the target 'aten\.relu6\.default'; near names",
            ),
            ({"targets_to_include": [torch.ops.aten.gelu.default]}, r"no node has the target 'aten\.gelu\.default'"),
            ({"low_precision_type": torch.int8}, r"known are torch\.float16 and torch\.bfloat16.*quantisation"),
            ({"low_precision_type": "fp8"}, "known are"),
            ({"data_max": -1.0}, "data_max=-1.0: give a positive number"),
            ({"data_max": float("nan")}, "data_max=nan"),
            ({"init_max": 0.0}, "init_max=0.0"),
            ({"max_depth_of_reduction": 0}, "max_depth_of_reduction=0"),
            ({"range_quantile": 1.5}, "range_quantile=1.5: give a share"),
        ],
    )
    def test_bad_settings_are_plan_errors_that_say_what_to_do(self, program, ranges, arguments, message):
        with pytest.raises(PlanError, match=message):
            classify(program, ranges, **arguments)

    def test_a_quantile_needs_histograms(self, program):
        table = calibrate(program, batches(), histogram=False, progress=False)
        classify(program, table)
        with pytest.raises(PlanError, match="measured with histogram=False"):
            classify(program, table, range_quantile=0.99)

    @pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
    def test_types_have_their_usual_names(self, program, ranges, name):
        assert classify(program, ranges, low_precision_type=name).low_precision_type == torch.bfloat16

    def test_ranges_of_another_program_are_refused_by_node(self, ranges):
        other = torch.export.export(nn.Linear(6, 2), (torch.randn(4, 6),))
        with pytest.raises(MismatchError, match="these ranges belong to another program: node"):
            classify(other, ranges)


@dataclass(frozen=True)
class NoRelu:
    """A user's rule, with a field."""

    because: str

    def __call__(self, facts):
        return Verdict("no_relu", self.because) if facts.base == "relu" else None


class TestUserRules:
    def test_a_rule_is_one_more_entry(self, program, ranges):
        plan = classify(program, ranges, rules=[NoRelu("we measured it on the device")])
        assert rules_of(plan)["relu"] == "no_relu"
        assert "we measured it on the device" in plan.explain("relu")
        assert "no_relu" in plan.settings["rules"]

    def test_a_rule_that_raises_or_answers_nonsense_is_named_with_its_node(self, program, ranges):
        def broken(facts):
            return 1 / 0

        def nonsense(facts):
            return True

        with pytest.raises(PlanError, match="rule broken raised ZeroDivisionError on node linear"):
            classify(program, ranges, rules=[broken])
        with pytest.raises(PlanError, match="rule nonsense answered True on node linear"):
            classify(program, ranges, rules=[nonsense])


class TestThePlan:
    def test_names_are_tuples_in_graph_order_without_kept_nodes(self, program, ranges):
        plan = classify(program, ranges)
        order = [node.name for node in program.graph.nodes if node.op == "call_function"]
        for names in (plan.low_precision_nodes, plan.high_precision_nodes):
            assert isinstance(names, tuple)
            assert list(names) == [name for name in order if name in names]
        assert set(plan.low_precision_nodes).isdisjoint(plan.high_precision_nodes)

    def test_the_frame_has_one_row_per_node(self, program, ranges):
        frame = classify(program, ranges).frame
        assert frame.columns == [
            "node", "op", "module", "precision", "rule", "reason", "evidence", "limit", "verdicts", "work",
        ]  # fmt: skip
        assert frame["node"].is_unique().all()
        assert frame.filter(pl.col("precision") == "low")["rule"].null_count() == frame["rule"].null_count()
        by_node = dict(frame.select("node", "work").rows())
        assert by_node["linear"] == 2 * 4 * 6 * 6
        assert by_node["relu"] == 0
        assert dict(frame.select("node", "module").rows())["relu"] == "inner"

    def test_printed_it_is_a_compact_table(self, program, ranges):
        text = str(classify(program, ranges))
        assert re.match(r"PrecisionPlan: \d+ float16, \d+ high, \d+ kept; [\d.]+% of nodes and [\d.]+% of work", text)
        assert len(text.splitlines()) < 12

    def test_explain_is_a_sentence_and_unknown_names_list_near_ones(self, program, ranges):
        plan = classify(program, ranges)
        assert plan.explain("linear").startswith("linear (aten.linear.default, inner.linear) runs in float16: ")
        assert "within data_max 512" in plan.explain("linear")
        assert "has no half-precision implementation" in plan.explain("linalg_inv")
        with pytest.raises(PlanError, match=r"no node 'linaer_1'; near names: linear"):
            plan.explain("linaer_1")

    def test_saved_and_loaded_it_is_equal(self, program, ranges, tmp_path):
        plan = classify(program, ranges, data_max=float("inf"), nodes_to_exclude={"relu"})
        plan.save(tmp_path / "plan.json")
        loaded = PrecisionPlan.load(tmp_path / "plan.json")
        assert loaded.decisions == plan.decisions
        assert loaded.settings == plan.settings
        assert loaded.fingerprint == plan.fingerprint
        assert loaded.frame.equals(plan.frame)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[: len(text) // 2], "truncated or foreign"),
            (lambda text: "{}", "no calibcast header"),
            (lambda text: text.replace('"schema": 1', '"schema": 7'), "newer calibcast"),
            (lambda text: text.replace('"calibcast": "plan"', '"calibcast": "engine"'), "is a calibcast engine file"),
            (lambda text: text.replace('"precision": "low"', '"precision": "lower"', 1), "unknown precision 'lower'"),
            (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "decisions"}), "decisions"),
            (lambda text: text.replace("float16", "float12"), "float12"),
        ],
    )
    def test_a_file_that_is_no_plan_is_refused(self, program, ranges, tmp_path, change, message):
        path = tmp_path / "plan.json"
        classify(program, ranges).save(path)
        path.write_text(change(path.read_text()))
        with pytest.raises(ArtifactError, match=message):
            PrecisionPlan.load(path)

    def test_weights_that_become_inf_or_zero_are_named(self):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1e5, 1.0], [1e-9, 1.0]]))
        program = torch.export.export(model, (torch.ones(1, 2),))
        plan = classify(program, calibrate(program, [torch.zeros(1, 2)], progress=False), nodes_to_include={"linear"})
        assert any("p_weight has values up to 1e+05: inf in float16" in note for note in plan.notes)
        assert any("p_weight has values down to 1e-09: zero in float16" in note for note in plan.notes)


class Reductions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 2)
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.norm, self.group = nn.LayerNorm((5, 7)), nn.GroupNorm(2, 4)

    def forward(self, a, b, c, d, e):
        return (
            F.linear(a, b), torch.addmm(a[:, :5], a, b.t()), a @ b.t(),
            torch.bmm(c, c.mT), torch.baddbmm(c @ c.mT, c, c.mT), self.conv1(c),
            self.conv2(d), self.conv3(e), self.up(d), F.scaled_dot_product_attention(c, c, c),
            c.sum(), c.mean(1), c.var((0, 2)), self.norm(c.view(2, 4, 7).expand(5, 2, 4, 7).permute(1, 2, 0, 3)),
            self.group(d), c.cumsum(1),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "depth"),
    [
        ("linear", 7), ("addmm", 7), ("bmm", 7), ("baddbmm", 7), ("conv1d", 12), ("conv2d", 18), ("conv3d", 32),
        ("conv_transpose2d", 36), ("scaled_dot_product_attention", 7), ("sum", 56), ("mean", 4), ("var", 14),
        ("layer_norm", 35), ("group_norm", 2 * 9 * 9), ("cumsum", 4),
    ],
)  # fmt: skip
def test_depths_of_reduction(op, depth):
    """Each against the number of terms in the operator's own definition."""
    example = (
        torch.randn(3, 7),
        torch.randn(5, 7),
        torch.randn(2, 4, 7),
        torch.randn(2, 4, 9, 9),
        torch.randn(2, 4, 3, 3, 3),
    )
    program = torch.export.export(Reductions().eval(), example)
    name = next(
        n.name for n in program.graph.nodes if n.op == "call_function" and n.target._schema.name == f"aten::{op}"
    )
    for limit, met in ((depth, False), (depth - 1, True)):
        plan = classify(program, None, max_depth_of_reduction=limit)
        assert ("max_depth_of_reduction" in {v.rule for v in plan[name].verdicts}) is met


class Proposal(nn.Module):
    """The worked example of Torch-TensorRT's autocast proposal."""

    def __init__(self, device):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc1, self.device = nn.Linear(8 * 4 * 4, 10), device

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        with torch.autocast(self.device, dtype=torch.float32):
            return self.fc1(x)


@pytest.mark.filterwarnings("ignore:.*autocast.*")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_proposals_worked_example_gets_the_proposals_classification(device):
    from calib.execution import ProgramRunner
    from passes import insert_casts

    torch.manual_seed(0)
    model, x = Proposal(device).eval(), torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,))
    plan = classify(program, calibrate(program, [x], progress=False), nodes_to_exclude={"^conv2d$"})
    assert plan.low_precision_nodes == ("relu", "max_pool2d", "conv2d_1", "relu_1", "max_pool2d_1", "flatten")
    assert plan.high_precision_nodes == ("conv2d",)
    assert plan["submod_1.linear"].precision == "kept"
    (out,) = ProgramRunner(insert_casts(program, plan)).run([x])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model(x), rtol=1e-2, atol=1e-2)
