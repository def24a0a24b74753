"""A TensorRT engine built from the ONNX model that calibcast exports, with TensorRT's own parser and nothing else.

    engine = OnnxEngine(program, plan)
    outputs = engine(*batch)              # on the GPU

The way of a user who takes the ONNX model to a service: no Torch-TensorRT, and whichever TensorRT is here.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from calibcast.engines import export_onnx
from calibcast.passes import PrecisionPlan, insert_casts
from torch.export import ExportedProgram

_MODULES = ("tensorrt_rtx", "tensorrt")


class OnnxError(Exception):
    """TensorRT refuses the model, or what it made of it."""


class OnnxEngine:
    """An engine with the sizes of one batch. `record` and `backend` are named as those of `calibcast.Engine`."""

    def __init__(self, program: ExportedProgram, plan: PrecisionPlan, disable_tf32: bool = False) -> None:
        self.plan, self._trt = plan, tensorrt()
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self.backend = f"ONNX, {self._trt.__name__} {self._trt.__version__}"
        self.record: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(insert_casts(program, plan), plan, Path(folder) / "model.onnx")
            self.serialised = built(path, disable_tf32=disable_tf32)
        self._engine: Any = None

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        if self._engine is None:
            self._set_up()
        outputs, given = [], iter(inputs)
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            kind = getattr(torch, _NAMES[str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]])
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                value = next(given).to("cuda", kind).contiguous()
                self._context.set_input_shape(name, tuple(value.shape))
            else:
                value = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device="cuda")
                outputs.append(value)
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise OnnxError("TensorRT did not run the engine; its log on stderr says why")
        return outputs

    def _set_up(self) -> None:
        engine = self._trt.Runtime(self._logger).deserialize_cuda_engine(self.serialised)
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise OnnxError("the engine gets no execution context on this GPU")
        self._engine, self._context = engine, context


def built(path: Path, batch: Sequence[torch.Tensor] = (), disable_tf32: bool = False) -> bytes:
    """Parse and build a model; sizes that may vary are those of `batch`. Raises OnnxError with the parser's words."""
    trt = tensorrt()
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        raise OnnxError("; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in found))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for given, tensor in zip(inputs, batch, strict=False):  # behind the caller's own inputs comes state
        if any(size < 0 for size in given.shape):
            profile.set_shape(given.name, *[tuple(tensor.shape)] * 3)
    config.add_optimization_profile(profile)
    if disable_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise OnnxError("TensorRT builds no engine of it; its log on stderr says why")
    return bytes(made)


_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}


def tensorrt() -> Any:
    """TensorRT's Python module, of whichever flavour is here."""
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(_MODULES)} can be imported")
