"""Ask the real TensorRT-RTX builder whether it takes a program, on a machine with or without a GPU.

TensorRT-RTX builds ahead of time. Without a GPU, stand-ins answer what Torch-TensorRT asks of torch.cuda, and the
deserialising of the finished engine, which needs a GPU, is left out. To be run in a child process: the builder may
crash, and the stand-ins must not outlive the question.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

import torch
from calibcast.calib.execution import input_structure
from calibcast.calib.graph import size_hint
from torch.export import ExportedProgram

STAND_INS: dict[str, Any] = {
    "get_device_capability": lambda *_: (9, 0),
    "current_device": lambda: 0,
    "mem_get_info": lambda *_: (1 << 35, 1 << 35),
    "get_device_name": lambda *_: "none",
}


def has_builder() -> bool:
    """Whether the version that the tests of the builder are about is installed; found without importing it."""
    try:
        return metadata.version("torch-tensorrt-rtx").startswith("2.14")
    except metadata.PackageNotFoundError:
        return False


class _Unread:
    """Stands for an engine that was built and is not deserialised."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data

    def get_aliased_input_tensor(self, _: str) -> None:
        return None


class _Runtime:
    def __init__(self, *_: Any) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> _Unread:
        return _Unread(data)


@cache
def package() -> Any:
    """`torch_tensorrt`, imported with the stand-ins where there is no GPU."""
    if not torch.cuda.is_available():
        for name, answer in STAND_INS.items():
            setattr(torch.cuda, name, answer)
    import torch_tensorrt
    from torch_tensorrt.dynamo.conversion import _TRTInterpreter

    if not torch.cuda.is_available():
        _TRTInterpreter.trt.Runtime = _Runtime
    return torch_tensorrt


def engine_size(program: ExportedProgram, **settings: Any) -> int:
    """Bytes of the engine that the builder makes of the whole program. Raises what the builder raises."""
    torch_tensorrt = package()
    args, kwargs = input_structure(program, _inputs(program))
    from torch_tensorrt.dynamo.conversion import UnsupportedOperatorException as unsupported  # noqa: N813

    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program, arg_inputs=args, kwarg_inputs=kwargs, min_block_size=1, **settings
        )
    except unsupported as error:  # its own message is the whole module, printed
        raise RuntimeError(str(error.__cause__)) from error
    return len(bytes(engine))


def _inputs(program: ExportedProgram) -> list[Any]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [_input(program, values[name]) if name in values else name for name in program.graph_signature.user_inputs]


def _input(program: ExportedProgram, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    least, usual, most = (
        zip(*(_range(program, size) for size in value.shape), strict=True) if value.dim() else ((),) * 3
    )
    if least == most:
        return package().Input(shape=usual, dtype=value.dtype)
    return package().Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=value.dtype)


def _range(program: ExportedProgram, size: Any) -> tuple[int, int, int]:
    """Least, exported and most of a size; where the export has no upper bound, four times what it was there."""
    usual = size_hint(size)
    bounds = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
    if bounds is None:
        return usual, usual, usual
    return int(bounds.lower), usual, int(bounds.upper) if bounds.upper.is_Integer else 4 * usual
