"""The ledger: from planned nodes to engine layers, and the gate on it. Pure, so without a builder."""

import dataclasses

import polars as pl
import pytest
import torch
from calibcast.calib import GateError
from calibcast.calib.marks import inserted_nodes
from calibcast.engines import build
from calibcast.engines.ledger.inspection import EngineLayer
from calibcast.engines.ledger.ledger import SCHEMA, ledger_of
from calibcast.engines.ledger.ledger_text import ledger_text, require_precision, unknown_share
from calibcast.passes import PrecisionPlan, classify, insert_casts
from calibcast.passes.plan import Decision
from torch import nn


def plan(**nodes):
    """`plan(linear="low", mul="high")`; a pair names the op, too."""
    rows = {
        name: value if isinstance(value, tuple) else (value, "aten.linear.default") for name, value in nodes.items()
    }
    decisions = tuple(Decision(name, op, "", precision, None, "") for name, (precision, op) in rows.items())
    return PrecisionPlan(decisions, torch.float16, {})


def made(node, name="", kind="MATRIX_MULTIPLY", outputs=(), shapes=()):
    return {"node": node, "name": name or f"[X]-[{node}]", "kind": kind, "outputs": outputs, "shapes": shapes}


def row(ledger, node):
    return ledger.row(by_predicate=pl.col("node") == node, named=True)


HALF = {"reads": ("float16",), "writes": ("float16",)}
FLOAT = {"reads": ("float32",), "writes": ("float32",)}


def test_a_layer_of_its_own_is_exact_and_one_that_is_shared_is_fused():
    layers = [EngineLayer("a", ("linear",), **HALF), EngineLayer("b", ("mul", "add"), **FLOAT)]
    ledger = ledger_of(
        plan(linear="low", mul="high", add="high"), [made("linear"), made("mul"), made("add")], layers, {}
    )
    assert dict(ledger.schema) == SCHEMA
    assert row(ledger, "linear") == {
        "node": "linear",
        "op": "aten.linear.default",
        "module": "",
        "planned": "low",
        "planned_type": "float16",
        "layers": ["a"],
        "actual_types": ["float16"],
        "match": "exact",
        "found_by": "metadata",
        "agrees": True,
    }
    assert (row(ledger, "mul")["match"], row(ledger, "mul")["agrees"]) == ("fused", True)


def test_a_layer_in_another_type_contradicts_the_plan():
    ledger = ledger_of(plan(linear="low"), [made("linear")], [EngineLayer("a", ("linear",), **FLOAT)], {})
    assert row(ledger, "linear")["agrees"] is False
    with pytest.raises(GateError, match="linear planned float16, found float32 in a") as caught:
        require_precision(ledger, allow_unknown=True)
    assert caught.value.report["node"].to_list() == ["linear"]


def test_what_a_kernel_does_between_its_edges_contradicts_nothing():
    """cast to fp32, softmax, cast back in one kernel: fp16 on both edges, and fp32 inside all the same."""
    layers = [EngineLayer("k", ("linear_as_float32", "softmax", "linear"), **HALF)]
    ledger = ledger_of(plan(linear="low", softmax="high"), [made("linear"), made("softmax")], layers, {})
    assert row(ledger, "softmax")["agrees"] is None
    require_precision(ledger, allow_unknown=False)


@pytest.mark.parametrize(
    ("beside", "agrees"), [("x_as_float32", None), ("view_as_real", False), ("expand_as_1", False)]
)
def test_a_cast_is_what_calibcast_has_inserted_whatever_it_is_called(beside, agrees):
    """A kernel with a cast in it may compute in fp32 between edges in fp16; one with `view_as_real` in it does not."""
    layers = [EngineLayer("k", (beside, "softmax"), **HALF)]
    inserted = frozenset({"x_as_float32", "elsewhere"})
    ledger = ledger_of(plan(softmax="high"), [made("softmax")], layers, {}, None, inserted)
    assert row(ledger, "softmax")["agrees"] is agrees
    assert row(ledger_of(plan(softmax="high"), [made("softmax")], layers, {}), "softmax")["agrees"] is False


def test_a_conversion_of_the_users_own_is_a_cast_too():
    """`x.float().softmax()` in one kernel with its conversion: the edges are fp16, the softmax is not."""
    layers = [EngineLayer("k", ("to", "softmax"), **HALF)]
    decided = plan(softmax="high")
    own = Decision("to", "aten.to.dtype", "", "kept", "stated_type", "the user's own")
    decided = dataclasses.replace(decided, decisions=(own, *decided.decisions))
    assert row(ledger_of(decided, [made("softmax")], layers, {}), "softmax")["agrees"] is None


def test_what_insert_casts_has_inserted_is_marked_and_stays_so(tmp_path):
    """Casts and the clamps of masks, in the program, and in what `.pt2` brings back; nothing of the user's is."""

    class Masked(nn.Module):
        def forward(self, x, mask):
            scores = torch.where(mask, x * 2.0, -1e9)
            return torch.view_as_real(torch.view_as_complex(scores.softmax(-1).reshape(2, 2, 2)))

    args = (torch.randn(2, 4), torch.tensor([True, False, True, True]).expand(2, 4))
    program = torch.export.export(Masked(), args)
    mixed = insert_casts(program, classify(program, None, nodes_to_include={"^(mul|softmax)$"}))
    added = {n.name for n in mixed.graph.nodes} - {n.name for n in program.graph.nodes}
    assert inserted_nodes(mixed.graph) == added
    assert added
    assert inserted_nodes(program.graph) == frozenset()
    torch.export.save(mixed, tmp_path / "mixed.pt2")
    assert inserted_nodes(torch.export.load(tmp_path / "mixed.pt2").graph) == added


def test_moving_data_before_or_after_a_cast_is_the_same():
    layers = [EngineLayer("k", ("transpose",), **HALF)]
    ledger = ledger_of(plan(transpose=("high", "aten.transpose.int")), [made("transpose", kind="SHUFFLE")], layers, {})
    assert row(ledger, "transpose")["agrees"] is None


@pytest.mark.parametrize(
    ("layer", "found_by"),
    [
        (EngineLayer("other", ("linear",)), "metadata"),
        (EngineLayer("[X]-[linear] + [X]-[relu]"), "layer name"),
        (EngineLayer("__myl_Fc", outputs=("linear_output",)), "tensor name"),
        (EngineLayer("__myl_Fc", shapes=((2, 3),)), "shapes"),
    ],
)
def test_a_node_is_found_by_the_surest_way_there_is(layer, found_by):
    network = [made("linear", outputs=["linear_output"], shapes=[[2, 3]])]
    ledger = ledger_of(plan(linear="low"), network, [layer], {})
    assert row(ledger, "linear")["found_by"] == found_by


def test_nodes_between_two_layers_that_touch_are_in_them():
    """conv -> batch_norm -> relu -> linear: TensorRT folds norm and ReLU into the convolution without a trace."""
    network = [made(node) for node in ("conv", "norm", "relu", "linear")]
    readers = {"conv": ["norm"], "norm": ["relu"], "relu": ["linear"], "linear": []}
    decided = plan(conv="low", norm="low", relu="low", linear="low")
    touching = [
        EngineLayer("first", ("conv",), outputs=("t1",), **HALF),
        EngineLayer("second", ("linear",), inputs=("t1",), **HALF),
    ]
    ledger = ledger_of(decided, network, touching, {}, readers)
    assert [row(ledger, node)["found_by"] for node in ("norm", "relu")] == ["neighbours"] * 2
    assert row(ledger, "relu")["layers"] == ["first"]
    assert row(ledger, "relu")["match"] == "fused"
    moved = EngineLayer("__myl_ReshTran_myl0_3", inputs=("t1",), outputs=("t2",))
    through = [touching[0], moved, EngineLayer("second", ("linear",), inputs=("t2",), **HALF)]
    assert row(ledger_of(decided, network, through, {}, readers), "relu")["found_by"] == "neighbours"
    apart = [
        touching[0],
        EngineLayer("something", inputs=("t1",), outputs=("t2",)),
        EngineLayer("second", ("linear",), inputs=("t2",)),
    ]
    ledger = ledger_of(decided, network, apart, {}, readers)
    assert row(ledger, "relu")["match"] == "unknown"


def test_shapes_that_two_nodes_have_tell_nothing():
    network = [made("a", shapes=[[2, 3]]), made("b", shapes=[[2, 3]])]
    ledger = ledger_of(plan(a="low", b="low"), network, [EngineLayer("k", shapes=((2, 3),))], {})
    assert ledger["match"].to_list() == ["unknown", "unknown"]


def test_a_copy_for_another_format_is_not_the_layer_that_it_is_named_after():
    layers = [EngineLayer("Reformatting CopyNode for Input Tensor 0 to [X]-[linear]")]
    ledger = ledger_of(plan(linear="low"), [made("linear")], layers, {})
    assert row(ledger, "linear")["match"] == "unknown"


def test_nodes_without_a_layer_are_accounted_for():
    """Lowering left nothing of dropout; TensorRT left nothing of a reshape; relu runs in PyTorch."""
    network = [made("linear"), made("reshape", kind="SHUFFLE")]
    decided = plan(linear="low", dropout="low", reshape="low", relu="low")
    ledger = ledger_of(decided, network, [EngineLayer("a", ("linear",), **HALF)], {"relu": ["float16"]})
    assert dict(zip(ledger["node"], ledger["found_by"], strict=True)) == {
        "linear": "metadata",
        "dropout": "lowering",
        "reshape": "folding",
        "relu": "pytorch",
    }
    assert unknown_share(ledger) == 0.0


def test_an_engine_that_tells_nothing_leaves_nodes_unknown_and_the_gate_shut():
    ledger = ledger_of(plan(linear="low", reshape="low"), [made("linear"), made("reshape", kind="SHUFFLE")], [], {})
    assert unknown_share(ledger) == 1.0
    with pytest.raises(GateError, match=r"2 of 2 nodes could not be found.*allow_unknown=True"):
        require_precision(ledger, allow_unknown=False)
    require_precision(ledger, allow_unknown=True)


def test_a_layer_that_lost_its_node_leaves_missing_nodes_unknown():
    """Lowering may have renamed the node: that it has no layer cannot be told."""
    ledger = ledger_of(plan(gelu="low"), [made("", name="[ERF]")], [EngineLayer("k")], {})
    assert row(ledger, "gelu")["match"] == "unknown"


def test_the_text_shows_what_disagrees_first_and_the_share_of_unknown():
    layers = [EngineLayer("a", ("good",), **HALF), EngineLayer("b", ("bad",), **FLOAT)]
    text = ledger_text(
        ledger_of(plan(good="low", bad="low", lost="low"), [made(n) for n in ("good", "bad", "lost")], layers, {})
    )
    title, _, first, second, _ = text.splitlines()
    assert title == "ledger: 3 planned nodes, 2 exact, 0 fused, 1 unknown; 1 contradict the plan; 33.3% unknown"
    assert first.startswith("! bad")
    assert second.startswith("  lost")


def test_the_eager_backend_runs_the_graph_itself():
    program = torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),))
    ledger = build(program, backend="eager", strict_precision=True).ledger
    assert ledger.select("node", "planned_type", "match", "found_by", "agrees").rows() == [
        ("linear", "float32", "exact", "graph", True)
    ]
