"""ONNX out: the plan's types and nothing else, the caller's names, and an answer that ONNX Runtime agrees with."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from calibcast import BuildError, classify, export_onnx, insert_casts
from calibcast.calib.errors import ArtifactError
from calibcast.engines.cli import main
from calibcast.engines.io_names import flat_output_names, input_names, size_names
from calibcast.engines.onnx_export.translation import small_letters
from torch import nn
from torch.export import Dim, export

from tests.unmeasured import calibrate


class Faint(nn.Module):
    """Divides by something tiny plus 1e-8, which `torch.onnx.export(optimize=True)` deletes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, image, more):
        hidden = torch.relu(self.first(image)) * more["scale"][0]
        logits = self.last(hidden)
        size = logits.abs().sum(-1, keepdim=True)
        return {"logits": logits, "unit": logits / ((size * 0) * 1e-3 + 1e-8), "twice": (logits, image)}


def inputs(rows):
    return torch.randn(rows, 8), {"scale": [torch.rand(rows, 1) + 0.5]}


def exported(model=None, args=None, shapes=None):
    rows = {0: Dim("batch", min=1, max=64)}
    shapes = {"image": rows, "more": {"scale": [rows]}} if model is None else shapes
    with torch.no_grad():
        return export((model or Faint()).eval(), args or inputs(3), dynamic_shapes=shapes)


def cast(program, batches):
    ranges = calibrate(program, batches, progress=False)
    plan = classify(program, ranges)
    return insert_casts(program, plan), plan


@pytest.fixture(scope="module")
def faint():
    return cast(exported(), [inputs(5) for _ in range(3)])


@pytest.fixture(scope="module")
def written(faint, tmp_path_factory):
    return export_onnx(*faint, tmp_path_factory.mktemp("onnx") / "model.onnx")


def run(path, *tensors, names=None):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = names or [value.name for value in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})


def distance(given, wanted):
    """Relative L2."""
    wanted = wanted.detach().numpy()
    return np.linalg.norm(given - wanted) / np.linalg.norm(wanted)


def test_names_and_sizes_are_the_callers(faint, written):
    """Inputs and outputs, also those within lists and dicts, and dynamic sizes, are called as the user calls them."""
    model = onnx.load(written)
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert sizes == {"image": ["batch", 8], "more_scale_0": ["batch", 1]}
    outputs = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert outputs == {"logits": ["batch", 4], "unit": ["batch", 4], "twice_0": ["batch", 4], "twice_1": ["batch", 8]}


def test_onnxruntime_agrees_at_another_size(faint, written):
    """Every output is that of the cast graph; the division by 1e-8 is not one by zero."""
    image, more = inputs(11)
    wanted = faint[0].module()(image, more)
    logits, unit, again, same = run(written, image, more["scale"][0])
    assert np.isfinite(unit).all()
    assert distance(unit, wanted["unit"]) < 3e-3
    assert distance(logits, wanted["logits"]) < 3e-3
    assert (again == logits).all()
    assert (same == image.numpy()).all()


def test_the_constant_that_an_optimiser_deletes_is_there(written):
    """`+ 1e-8` is an Add of its own, in fp32."""
    model = onnx.load(written)
    constants = {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    added = [constants.get(name) for node in model.graph.node if node.op_type == "Add" for name in node.input]
    assert any(value is not None and value.dtype == np.float32 and value == np.float32(1e-8) for value in added)


def test_types_are_the_plans(faint, written):
    """Each node that the plan has in fp16 computes in fp16: no casts but the plan's."""
    mixed = faint[0]
    model = onnx.shape_inference.infer_shapes(onnx.load(written))
    half = onnx.TensorProto.FLOAT16
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    low = [
        node
        for node in model.graph.node
        if {"calibcast.precision": "low"}.items() <= {p.key: p.value for p in node.metadata_props}.items()
        and node.op_type != "Constant"
    ]
    assert {"Gemm", "Relu", "Abs", "ReduceSum"} <= {node.op_type for node in low}
    assert {types[name] for node in low for name in node.output} == {half}
    casts = sum(node.target is torch.ops.aten._to_copy.default for node in mixed.graph.nodes)
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    assert sum(node.op_type == "Cast" and node.input[0] not in constants for node in model.graph.node) == casts


def test_the_plan_is_in_the_metadata(faint, written):
    """Node by node with its reason, and the ONNX nodes that it went into; no path of the exporting machine."""
    _, plan = faint
    model = onnx.load(written)
    metadata = {p.key: p.value for p in model.metadata_props}
    rows = json.loads(metadata["calibcast.plan"])["nodes"]
    assert {node: row["reason"] for node, row in rows.items()} == {d.node: d.reason for d in plan.decisions}
    names = {node.name for node in model.graph.node}
    assert all(set(row["onnx"]) <= names for row in rows.values())
    assert all(row["onnx"] for row in rows.values() if row["precision"] != "kept")
    assert b"stack_trace" not in written.read_bytes()


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("total", torch.zeros(64))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return self.linear(x) + self.total


def test_state_is_an_input_and_an_output(tmp_path):
    """A program that writes to a buffer: fed back, three calls give what three calls of the program give."""
    program = exported(Large(), (torch.randn(2, 64),))
    path = export_onnx(*cast(program, [torch.randn(2, 64)]), tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").stat().st_size >= 64 * 64 * 2
    state = dict(np.load(tmp_path / "large.onnx.state.npz"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [v.name for v in session.get_inputs()] == ["x", "total"]
    assert [v.name for v in session.get_outputs()] == ["output", "total_next"]
    module = program.module()
    for _ in range(3):
        x = torch.randn(2, 64)
        output, state["total"] = session.run(None, {"x": x.numpy(), **state})
        assert distance(output, module(x)) < 3e-3


def test_a_convolution_without_bias_has_none(tmp_path):
    """onnxscript gives `conv3d` a bias of zeros of a shape that ONNX Runtime refuses."""
    program = exported(nn.Conv3d(2, 3, 3, bias=False), (torch.randn(1, 2, 4, 4, 4),))
    mixed, plan = cast(program, [torch.randn(1, 2, 4, 4, 4)])
    path = export_onnx(mixed, plan, tmp_path / "conv.onnx")
    x = torch.randn(1, 2, 4, 4, 4)
    assert distance(run(path, x)[0], mixed.module()(x)) < 3e-3
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Cast", "Conv", "Cast"]


def test_what_onnx_lacks_is_named(tmp_path):
    """An operator without ONNX form is an error with its name, and nothing is written."""
    program = exported(Lgamma(), (torch.rand(3) + 1,))
    with pytest.raises(BuildError, match="digamma"):
        export_onnx(program, None, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArtifactError, match=r"ends in \.onnx"):
        export_onnx(program, None, tmp_path / "model.bin")


class Lgamma(nn.Module):
    def forward(self, x):
        return torch.digamma(x)


def test_command_exports_model_and_plan(tmp_path, faint, monkeypatch, capsys):
    """`calibcast export MODEL --plan P --onnx F` writes what `export_onnx` does; bad use is exit code 2."""
    program = exported()
    torch.export.save(program, tmp_path / "model.pt2")
    faint[1].save(tmp_path / "plan.json")
    arguments = ["export", str(tmp_path / "model.pt2"), "--plan", str(tmp_path / "plan.json")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--onnx", str(tmp_path / "out.onnx")])
    assert done.value.code == 0
    model = onnx.load(tmp_path / "out.onnx")
    assert [v.name for v in model.graph.output] == ["logits", "unit", "twice_0", "twice_1"]
    # torch writes no `Dim` names into a .pt2.
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "image_dim0"
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2


def test_names_that_clash_are_made_unlike():
    """Outputs called like inputs, keys that differ in punctuation only, and a single output."""

    class Clash(nn.Module):
        def forward(self, x, y):
            return {"x": x + 1, "a.b": y * 2, "a_b": y * 3}

    program = exported(Clash(), (torch.ones(2), torch.ones(2)), None)
    inputs = list(input_names(program).values())
    assert inputs == ["x", "y"]
    assert flat_output_names(program, inputs) == ["x_out", "a_b", "a_b_2"]
    assert size_names(program) == {}


def answers(path, *arrays):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, dict(arrays))


class Steps(nn.Module):
    """State that is only counted and only overwritten, and a view of what attention gave."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latest", torch.zeros(2, 3, 16))

    def forward(self, x):
        self.steps.add_(1)
        self.latest.copy_(x)
        heads = x.view(2, 3, 2, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return mixed.transpose(1, 2).reshape(2, 3, 16)


def test_state_that_nothing_else_reads_leaves_too(tmp_path):
    """torch.onnx drops a counter, and a buffer that is only overwritten: neither reaches an output of the program."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16)
    program = export(Steps().eval(), (x,))
    path = export_onnx(program, None, tmp_path / "steps.onnx")
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["x", "steps", "latest"]
    assert [value.name for value in model.graph.output] == ["output", "steps_next", "latest_next"]
    start = np.load(tmp_path / "steps.onnx.state.npz")
    output, steps, latest = answers(
        path, ("x", x.numpy()), ("steps", np.asarray(start["steps"] + 4)), ("latest", start["latest"])
    )
    assert steps == 5
    np.testing.assert_array_equal(latest, x.numpy())
    np.testing.assert_allclose(output, program.module()(x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_view_of_what_attention_gives_in_half_is_no_obstacle(tmp_path):
    """Decomposing attention in fp16 gives other strides than the export saw; of these a view was refused."""
    batches = [(torch.randn(2, 3, 16),) for _ in range(2)]
    mixed, plan = cast(export(Steps().eval(), batches[0]), batches)
    path = export_onnx(mixed, plan, tmp_path / "attention.onnx")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "Softmax" in kinds
    assert "Identity" not in kinds[:-2]  # of outputs alone: the copies that were made for it are gone


class Product(nn.Module):
    def forward(self, x):
        return torch.cumprod(x, -1)


def test_a_running_product_leaves(tmp_path):
    x = torch.rand(3, 5) + 0.5
    path = export_onnx(export(Product().eval(), (x,)), None, tmp_path / "product.onnx")
    (found,) = answers(path, ("x", x.numpy()))
    np.testing.assert_allclose(found, torch.cumprod(x, -1).numpy(), rtol=1e-5)


@torch.library.custom_op("calibcast_onnx_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class Own(nn.Module):
    def forward(self, x):
        return doubled(x) + 1


def test_an_operator_of_ones_own_leaves_by_ones_own_function(tmp_path):
    from onnxscript import opset18

    program = export(Own().eval(), (torch.ones(3),))
    with pytest.raises(BuildError, match=r"calibcast_onnx_test.doubled.*translations="):
        export_onnx(program, None, tmp_path / "own.onnx")
    table = {torch.ops.calibcast_onnx_test.doubled.default: lambda x: opset18.Add(x, x)}
    (found,) = answers(export_onnx(program, None, tmp_path / "own.onnx", table), ("x", np.ones(3, np.float32)))
    assert found.tolist() == [3.0, 3.0, 3.0]


class Bags(nn.Module):
    """Its embedding bags become a loop, whose body gives what it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(10, 4, mode="sum")

    def forward(self, ids, starts, x):
        return self.bag(ids, starts).reshape(2, 2, 2).sum(1) + x


def test_a_loop_keeps_what_its_body_hands_through(tmp_path):
    args = (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2]), torch.randn(2, 2))
    program = export(Bags().eval(), args)
    path = export_onnx(program, None, tmp_path / "bags.onnx")
    names = [value.name for value in onnx.load(path).graph.input]
    (found,) = answers(path, *zip(names, (value.numpy() for value in args), strict=True))
    np.testing.assert_allclose(found, program.module()(*args).detach().numpy(), rtol=1e-5, atol=1e-6)


class Pair(nn.Module):
    """Two buffers that get one new content, one of them by way of the other, and a third that gets an input."""

    def __init__(self):
        super().__init__()
        for name in ("first", "second", "third"):
            self.register_buffer(name, torch.zeros(4))

    def forward(self, x):
        self.first.add_(x * 2)
        self.second.copy_(self.first)
        self.third.copy_(x)
        return self.first + self.second


def test_buffers_that_get_one_new_content_are_each_an_output(tmp_path):
    x = torch.arange(4.0)
    program = export(Pair().eval(), (x,))
    path = export_onnx(program, None, tmp_path / "pair.onnx")
    names = [value.name for value in onnx.load(path).graph.output]
    assert names == ["output", "first_next", "second_next", "third_next"]
    state, module = dict(np.load(tmp_path / "pair.onnx.state.npz")), program.module()
    for step in range(3):
        given = x + step
        output, *new = answers(path, ("x", given.numpy()), *state.items())
        state = dict(zip(("first", "second", "third"), new, strict=True))
        np.testing.assert_array_equal(output, module(given).numpy())
        for name, value in module.named_buffers():
            np.testing.assert_array_equal(state[name], value.numpy())


class Cache(nn.Module):
    """It writes to what it is given, as decoders with a cache of the caller's do."""

    def forward(self, x, cache):
        cache["keys"].add_(x)
        cache["values"].copy_(x)
        return cache["keys"] * 2, cache["values"]


def test_what_is_written_to_an_input_is_an_output(tmp_path):
    x, cache = torch.arange(4.0), {"keys": torch.ones(4), "values": torch.zeros(4)}
    program = export(Cache().eval(), (x, cache))
    path = export_onnx(program, None, tmp_path / "cache.onnx")
    names = [value.name for value in onnx.load(path).graph.output]
    assert names == ["output_0", "output_1", "cache_keys_next", "cache_values_next"]
    given = {"x": x, "cache_keys": cache["keys"], "cache_values": cache["values"]}
    doubled, values, keys_next, values_next = answers(path, *((name, v.numpy()) for name, v in given.items()))
    np.testing.assert_array_equal(doubled, (x + 1).numpy() * 2)
    np.testing.assert_array_equal(keys_next, (x + 1).numpy())
    for written_to in (values, values_next):
        np.testing.assert_array_equal(written_to, x.numpy())


class Shaped(nn.Module):
    """Axes, sizes and lists of tensors, as in most networks, and an equation in capitals."""

    def forward(self, x):
        first, second = x.chunk(2, 1)
        parts = x.split([1, 3], 1)
        joined = torch.cat([first, second, *parts], 1).mean((2, 3)) + x.flatten(2).sum(-1).repeat(1, 2)
        scores = torch.einsum("B C H W, B D H W -> B C D", first, second).softmax(-1).amax(1)
        return joined, scores, x.var(1), torch.stack(x.unbind(1), -1).std(dim=(0, 1))


def parsed_by_tensorrt(path):
    """What TensorRT's own parser says against a model; an empty list where it takes it."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    parser.parse_from_file(str(path))
    return [f"{parser.get_error(i).node_name()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)]


@pytest.mark.parametrize("sizes", [None, {"x": {0: Dim("batch", min=2, max=16)}}], ids=["static", "dynamic"])
def test_tensorrt_parses_axes_sizes_and_lists_of_tensors(tmp_path, sizes):
    """TensorRT takes an axis only as a constant, and has no sequences. The answers stay what they were."""
    torch.manual_seed(0)
    x = torch.randn(4, 4, 5, 6)
    program = export(Shaped(), (x,), dynamic_shapes=sizes)
    path = export_onnx(program, None, tmp_path / "shaped.onnx")
    assert parsed_by_tensorrt(path) == []
    for ours, theirs in zip(answers(path, ("x", x.numpy())), program.module()(x), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_tensorrt_parses_the_casts_of_a_plan(written):
    assert parsed_by_tensorrt(written) == []


def test_nodes_that_come_of_a_list_say_of_which_node_they_are(tmp_path):
    program = export(Shaped(), (torch.randn(4, 4, 5, 6),))
    plan = classify(program, calibrate(program, [(torch.randn(4, 4, 5, 6),)], progress=False))
    path = export_onnx(insert_casts(program, plan), plan, tmp_path / "shaped.onnx")
    rows = json.loads({e.key: e.value for e in onnx.load(path).metadata_props}["calibcast.plan"])["nodes"]
    split = next(row for name, row in rows.items() if name.startswith("split"))
    assert split["onnx"]


@pytest.mark.parametrize(
    ("equation", "small"),
    [("BIj, BjK -> BIK", "abj,ajc->abc"), ("...ij,...jk->...ik", "...ij,...jk->...ik"), ("aA,bA->ab", "ac,bc->ab")],
)
def test_equations_are_written_in_small_letters(equation, small):
    assert small_letters(equation) == small
