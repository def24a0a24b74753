"""A `config.pbtxt` for Triton's TensorRT backend.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64",
    "int32": "TYPE_INT32", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL",
}  # fmt: skip


def triton_config(io: Mapping[str, Any]) -> str | None:
    """The text of the configuration for the engine that `io` (the content of `io.json`) describes; None where Triton
    cannot serve it.

    Triton has no backend for TensorRT-RTX. State would need Triton's sequence batcher, which the owner of the server
    has to set up. Names are those of the engine's own tensors, as Triton requires; a comment gives the caller's name
    where it differs. `max_batch_size` is 0, so all dimensions are listed, the batch too.
    """
    if io["library"] != "tensorrt" or io["state"]:
        return None
    inputs = [tensor for tensor in io["inputs"] if tensor["binding"] is not None]
    outputs = {tensor["binding"]: tensor for tensor in io["outputs"]}
    if any(tensor["dtype"] not in _TYPES for tensor in [*inputs, *outputs.values()]):
        return None
    lines = [
        f"# For TensorRT {_comment(io['versions'].get('tensorrt'))} on {_comment(io['gpu'] or 'any GPU')}.",
        "# Put this at <repository>/<model>/config.pbtxt, and the engine at <repository>/<model>/1/"
        f"{_comment(io['engine'])}.",
        'platform: "tensorrt_plan"',
        f"default_model_filename: {_quoted(io['engine'])}",
        "max_batch_size: 0",
        f"input [\n{_tensors(inputs)}\n]",
        f"output [\n{_tensors(outputs.values())}\n]",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string of protobuf's text format: https://protobuf.dev/reference/protobuf/textformat-spec/#string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else "".join(f"\\{b:03o}" for b in c.encode()) for c in escaped) + '"'


def _comment(text: object) -> str:
    """What may stand in a comment: one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _tensors(tensors: Any) -> str:
    return ",\n".join(_tensor(tensor) for tensor in tensors)


def _tensor(tensor: Mapping[str, Any]) -> str:
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in tensor["shape"])
    note = "" if tensor["name"] == tensor["binding"] else f"  # {_comment(tensor['name'])}"
    lines = [f"name: {_quoted(tensor['binding'])}", f"data_type: {_TYPES[tensor['dtype']]}", f"dims: [ {dims or 1} ]"]
    if not dims:  # Triton has no tensors without dimensions, and gives them to the engine so
        lines.append("reshape: { shape: [ ] }")
    return "\n    ".join([f"  {{{note}", *lines]) + "\n  }"
