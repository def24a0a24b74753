"""What engines say of their layers is read from every format that could be had; see inspected/README.md."""

import json
import mmap
import tempfile
from pathlib import Path

import pytest
from calibcast.calib import ArtifactError
from calibcast.engines.ledger.inspection import EngineLayer, nodes_in, parse_inspector, parse_listing, type_name

INSPECTED = Path(__file__).parent / "inspected"


def read(name):
    return (INSPECTED / name).read_text()


def test_a_detailed_layer_of_tensorrt_8_gives_name_and_types():
    (layer,) = parse_inspector(read("tensorrt_8.2.json"))
    assert layer == EngineLayer(
        name="PWN(PWN(relu_1), add_1)",
        reads=("float16",),
        writes=("float16",),
        inputs=("x",),
        outputs=("(Unnamed Layer* 1) [ElementWise]_output",),
        shapes=((10, 2),),
    )
    assert layer.is_half


def test_a_detailed_layer_of_tensorrt_10_gives_types_where_its_metadata_is_empty():
    (layer,) = parse_inspector(read("tensorrt_10_torch.json"))
    assert "aten_ops.convolution.default" in layer.name
    assert (layer.nodes, layer.types, layer.shapes) == ((), ("float16",), ((1, 3, 224, 224),))


def test_below_detailed_verbosity_there_are_names_alone():
    layers = parse_inspector(read("tensorrt_10_names.json"))
    assert [layer.name for layer in layers][:2] == ["[trainStation1]", "/backbone/maxpool/MaxPool"]
    assert all(layer.types == () for layer in layers)


def test_the_inspector_of_tensorrt_rtx_carries_our_metadata_through_fusion():
    """TensorRT-RTX 1.4 on an H200, of the same network as the listing below."""
    layers = parse_inspector(read("inspected_1.4.0.76.json"))
    nodes = {node: layer for layer in layers for node in layer.nodes}
    assert {"conv2d", "relu", "mean", "layer_norm", "linear", "mul", "softmax"} <= set(nodes)
    assert "float16" in nodes["conv2d"].types
    assert nodes["softmax"].types == ("float32",)


def test_tensorrt_11_tells_format_and_datatype_apart():
    """Written after NVIDIA's migration guide: a published layer of an 11 engine could not be had."""
    content = {
        "Layers": [
            {
                "Name": "gemm",
                "Metadata": "[node:linear]\x1e[node:relu]\x1e[node:linear]",
                "Inputs": [{"Name": "x", "Dimensions": [2, 4], "Format": "Row major linear", "Datatype": "BFloat16"}],
                "Outputs": [{"Name": "y", "Dimensions": [2, 3], "Format": "Row major linear", "DataType": "Float"}],
            }
        ],
        "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "BFloat16"}],
    }
    (layer,) = parse_inspector(json.dumps(content))
    assert (layer.nodes, layer.reads, layer.writes) == (("linear", "relu"), ("bfloat16",), ("float32",))


def test_the_listing_in_an_rtx_engine_names_nodes_and_types_of_every_kernel():
    """From a conv2d, relu, mean, layer_norm and linear in fp16, a mul and a softmax in fp32."""
    layers = parse_listing((INSPECTED / "tensorrt_rtx_1.6.engine").read_bytes())
    by_name = {layer.name: layer for layer in layers}
    assert len(layers) == 7  # the gemm inside the run-time fusion is not listed a second time
    convolution = by_name["[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution]"]
    assert (convolution.nodes, convolution.writes) == (("conv2d", "relu"), ("float16",))
    assert convolution.shapes == ((2, 8, 14, 14),)
    norm = by_name["__myl_CastMeanSubMulMeanAddSqrtDivMulCastMulAdd"]
    assert (norm.nodes, norm.types) == (("layer_norm",), ("float16",))
    assert by_name["__myl_FcAddCastMul"].nodes == ("linear", "mul", "linear_as_float32")
    assert layers[-1].nodes == ("softmax",)
    assert layers[-1].types == ("float32",)


class Watched(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, part):
        found = super().__getitem__(part)
        Watched.copied += len(found)
        return found


def test_an_engine_is_searched_and_not_copied():
    """It holds the weights. A listing ends at a zero byte, wherever the next one begins."""
    content = (INSPECTED / "tensorrt_rtx_1.6.engine").read_bytes()
    weights = b"\0" + bytes(range(1, 256)) * 20_000
    large = Watched(content + weights)
    assert parse_listing(large) == parse_listing(content)
    assert Watched.copied < 2 * len(content)
    with tempfile.TemporaryFile() as stream:
        stream.write(large)
        stream.flush()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert parse_listing(mapped) == parse_listing(content)


@pytest.mark.parametrize("data", [b"", b"vtrt", b"header {", b"header {\n}\nmain {", b"\0" * 64 + b"header { main {"])
def test_bytes_without_a_listing_claim_nothing(data):
    assert parse_listing(data) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Bindings": []}', "not json"])
def test_text_that_no_inspector_wrote_is_refused(text):
    with pytest.raises(ArtifactError, match="engine inspector"):
        parse_inspector(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Row major linear FP16 format", "float16"),
        ("Channel major FP32 format", "float32"),
        ("Row major linear FP32 format (kLINEAR)", "float32"),
        ("Half", "float16"),
        ("Float", "float32"),
        ("float", "float32"),
        ("BFloat16", "bfloat16"),
        ("Row major linear BF16 format", "bfloat16"),
        ("bf16", "bfloat16"),
        ("FP8", "float8"),
        ("Int32", ""),
        ("Row major linear INT8 format", ""),
        ("Bool", ""),
        ("", ""),
    ],
)
def test_types_are_read_as_torch_names_them(text, name):
    assert type_name(text) == name


def test_metadata_of_fused_layers_names_each_node_once():
    assert nodes_in("[node:a]\x1f[node:submod_1.b][node:a]") == ("a", "submod_1.b")
    assert nodes_in("[ONNX Layer: conv]") == ()
