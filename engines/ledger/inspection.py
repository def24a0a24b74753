"""Reading what an engine says about its layers. Pure functions from text or bytes to `EngineLayer`s.

Two sources:

- The engine inspector's JSON (`IEngineInspector::getEngineInformation`). It needs the engine deserialised, and so a
  GPU. TensorRT 8 to 10 give a tensor one field, `Format/Datatype` ("Row major linear FP16 format", "Half"). TensorRT 11
  has two fields, `Format` and `Datatype`, and for the engine `I/O Tensors` in place of `Bindings`
  (https://docs.nvidia.com/deeplearning/tensorrt/11.3.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html). Below
  detailed verbosity a layer is only its name.
- The listing inside an engine file of TensorRT-RTX: text that its compiler writes for its own runtime, with every
  kernel, what it reads and writes, and the metadata of the network layers that it came from. It is not documented;
  where it is not found, nothing is claimed. It needs no GPU, so ahead-of-time builds are judged by it.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from calibcast.calib.errors import ArtifactError

_NODE = re.compile(r"\[node:([^\]]*)\]")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine. nodes: graph nodes named in its metadata. reads, writes: the floating types of its
    inputs and outputs; a type that is not floating is left out. inputs, outputs: names of tensors. shapes: of the
    outputs."""

    name: str
    nodes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def is_half(self) -> bool:
        """Whether it reads or writes a half-precision type."""
        return bool({"float16", "bfloat16"} & set(self.types))

    @property
    def types(self) -> tuple[str, ...]:
        """The floating types that the layer reads or writes, each once."""
        return tuple(dict.fromkeys([*self.reads, *self.writes]))


def parse_inspector(text: str) -> list[EngineLayer]:
    """The layers in the JSON of the engine inspector, from TensorRT 8 to 11 and TensorRT-RTX.

    Raises ArtifactError for text that is not such JSON.
    """
    try:
        content = json.loads(text)
        layers = content["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"this is not what TensorRT's engine inspector writes: {error!r}") from error
    return [EngineLayer(name=layer) if isinstance(layer, str) else _inspected(layer) for layer in layers]


def _inspected(layer: Mapping[str, Any]) -> EngineLayer:
    reads, writes = layer.get("Inputs") or [], layer.get("Outputs") or []
    return EngineLayer(
        name=str(layer.get("Name", "")),
        nodes=nodes_in(str(layer.get("Metadata") or "")),
        reads=_types(reads),
        writes=_types(writes),
        inputs=tuple(str(t.get("Name", "")) for t in reads),
        outputs=tuple(str(t.get("Name", "")) for t in writes),
        shapes=tuple(tuple(t.get("Dimensions") or ()) for t in writes),
    )


def nodes_in(metadata: str) -> tuple[str, ...]:
    """The graph nodes that a layer's metadata names, each once. TensorRT joins the metadata of fused layers."""
    return tuple(dict.fromkeys(_NODE.findall(metadata)))


def _types(tensors: list[Mapping[str, Any]]) -> tuple[str, ...]:
    texts = (t.get("Format/Datatype") or t.get("Datatype") or t.get("DataType") or "" for t in tensors)
    return tuple(dict.fromkeys(name for name in map(type_name, texts) if name))


# Longest first: "BFloat16" holds "Float", "BF16" is no "F16".
_WORDS = (
    ("bfloat16", ("bfloat16", "bf16")),
    ("float8", ("fp8", "float8", "f8e4m3", "f8e5m2")),
    ("float4", ("fp4", "float4")),
    ("float16", ("float16", "fp16", "half")),
    ("float32", ("float32", "fp32", "float")),
)


def type_name(text: str) -> str:
    """The floating type that a format or datatype of TensorRT means, by torch's name; "" for integers and unknown."""
    plain = text.lower().replace(" ", "")
    return next((name for name, words in _WORDS if any(word in plain for word in words)), "")


def parse_listing(engine: bytes | mmap.mmap) -> list[EngineLayer]:
    """The kernels in an engine file of TensorRT-RTX, as its compiler listed them; [] where there is no listing.

    engine: the file's content, or the mapped file, of which only the listings are copied.
    """
    return [layer for text in _listings(engine) for layer in _listed(text)]


_HEADER, _ENTRY, _END = b"header {", b"\nmain {", b"\0"


def _listings(engine: bytes | mmap.mmap) -> Iterator[str]:
    """The listings in an engine, without those of run-time fusions, whose outer kernel is listed already."""
    start = engine.find(_HEADER)
    while start >= 0:
        following = engine.find(_HEADER, start + 1)
        last = following if following >= 0 else len(engine)
        end = engine.find(_END, start, last)  # a zero byte ends the text
        body = engine[start : end if end >= 0 else last]
        if _ENTRY in body and b"name=runtime-fusion-consts" not in body.split(b"descriptors {", 1)[0]:
            # The separators in metadata are control characters, so these are kept.
            yield body.decode("utf-8", errors="replace")
        start = following


_TENSOR = re.compile(r"^\s*(?:sub_)?tensor=\{.*? dims=\{([^}]*)\}.*? name=\"([^\"]*)\".* type=(\w+) \}", re.MULTILINE)
# A view: another shape of a tensor that is listed already.
_VIEW = re.compile(r"^\s*sub_tensor=\{ base=\"([^\"]*)\".*? name=\"([^\"]*)\"", re.MULTILINE)
_KERNEL = re.compile(r"^  (\w+)=\{ (.*)$", re.MULTILINE)
_NAME = re.compile(r"\bname=(?:\"((?:[^\"\\]|\\.)*)\"|(\S+))")
_READS, _WRITES = re.compile(r"\binput(?:_args)?=\{([^}]*)\}"), re.compile(r"\boutput(?:_args)?=\{([^}]*)\}")
_LAYERS = re.compile(r"\blayers=\"((?:[^\"\\]|\\.)*)\"")
_QUOTED = re.compile(r"\"([^\"]*)\"")


def _listed(text: str) -> Iterator[EngineLayer]:
    head, _, main = text.partition("\nmain {")
    types = {name: type_name(kind) for _, name, kind in _TENSOR.findall(head)}
    shapes = {
        name: tuple(int(size) for size in dims.split()) for dims, name, _ in _TENSOR.findall(head) if _plain(dims)
    }
    bases = {name: base for base, name in _VIEW.findall(head)}
    for _, line in _KERNEL.findall(main.split("\nshape_main {", 1)[0]):
        name, layers = _NAME.search(line), _LAYERS.search(line)
        reads, writes = (_QUOTED.findall(found[1]) if (found := e.search(line)) else [] for e in (_READS, _WRITES))
        if name is None or not (reads or writes):
            continue
        yield EngineLayer(
            name=name[1] or name[2],
            nodes=nodes_in(layers[1]) if layers else (),
            reads=_known(types, reads),
            writes=_known(types, writes),
            inputs=tuple(bases.get(tensor, tensor) for tensor in reads),
            outputs=tuple(writes),
            shapes=tuple(shapes[tensor] for tensor in writes if tensor in shapes),
        )


def _plain(dims: str) -> bool:
    return all(size.lstrip("-").isdigit() for size in dims.split())


def _known(types: Mapping[str, str], tensors: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(types[tensor] for tensor in tensors if types.get(tensor)))
