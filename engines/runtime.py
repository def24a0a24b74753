"""Runs an engine that `calibcast export --engine` wrote, with TensorRT's Python package and torch, without
Torch-TensorRT.

    from calibcast.engines.runtime import PlainEngine
    engine = PlainEngine("exported")
    outputs = engine(image)              # or engine(image=image): the caller's names, {name: tensor on the GPU}

It imports only the errors from calibcast, so a serving machine needs only torch and `tensorrt` or `tensorrt_rtx`.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.errors import ArtifactError, BatchError, BuildError, MismatchError

IO, STATE = "io.json", "state.safetensors"
SCHEMA = 1
_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class PlainEngine:
    """One TensorRT engine. Call it with tensors by position or by name; it returns {name: tensor} on its device.

    folder: the folder that `calibcast export --engine` wrote, or the engine's file in it. device: a CUDA device. This
    object keeps the state, such as a KV cache, which each call updates; `reset()` restores its start. Calls run on
    torch's current stream. Use one object in one thread at a time.

    Raises ArtifactError for files that are missing or not from calibcast, MismatchError for another TensorRT or GPU
    than the engine was built for, BuildError where TensorRT is missing or refuses the engine.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str | torch.device = "cuda") -> None:
        self.folder, self.io = read_io(folder)
        self.device = torch.device(device)
        self._trt = _tensorrt(self.io)
        _check_gpu(self.io, self.device)
        self._engine, self._context = self._made()
        self._inputs: list[dict[str, Any]] = self.io["inputs"]
        self._types = {n: _TYPES[str(self._engine.get_tensor_dtype(n)).rpartition(".")[2]] for n in self._names()}
        self._start = read_tensors(self.folder / STATE) if self.io["state"] else {}
        self.state: dict[str, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Restore the state at the start."""
        for name, value in self._start.items():
            if name in self.state:
                self.state[name].copy_(value)
            else:
                self.state[name] = value.to(self.device, copy=True)

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run once. Raises BatchError for inputs that the engine was not built for."""
        with torch.cuda.device(self.device), torch.no_grad():
            held = [self._bind(tensor, value) for tensor, value in self._by_input(args, kwargs)]
            outputs = self._allocated()
            if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
                raise BuildError("TensorRT did not run the engine; its log on stderr says why")
            for pair in self.io["state"]:
                if pair["output"] is not None and not pair["in_place"]:
                    self.state[pair["name"]].copy_(outputs[pair["output"]])
            del held  # kept until here: memory that the stream still reads must not be reused
        return {output["name"]: outputs[output["binding"]] for output in self.io["outputs"]}

    def _made(self) -> tuple[Any, Any]:
        path = self.folder / self.io["engine"]
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the engine was not copied whole")
        with torch.cuda.device(self.device):
            engine = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR)).deserialize_cuda_engine(
                path.read_bytes()
            )
            context = None if engine is None else engine.create_execution_context()
        if engine is None or context is None:
            done = "deserialise" if engine is None else "set up"
            raise BuildError(
                f"TensorRT does not {done} {path}: it is damaged, or this GPU ({_gpu(self.device)}) is outside of what "
                "it supports; its log on stderr says more"
            )
        return engine, context

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _by_input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[dict[str, Any], Any]]:
        names = [tensor["name"] for tensor in self._inputs]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(names) or set(given) != set(names):
            raise BatchError(f"the engine takes {', '.join(names)}; got {len(args)} by position and {sorted(kwargs)}")
        return [(tensor, given[tensor["name"]]) for tensor in self._inputs]

    def _bind(self, tensor: Mapping[str, Any], value: Any) -> torch.Tensor:
        """Tell the engine where an input is. Returns the tensor, which has to live until the engine has run."""
        _check_input(tensor, value)
        name = tensor["binding"]
        if name is None:  # the program takes this input, but does not use it
            return torch.empty(0)
        on_host = self._engine.is_shape_inference_io(name)  # TensorRT reads its values on the host
        device = torch.device("cpu") if on_host else self.device
        moved: torch.Tensor = value.detach().to(device, self._types[name]).contiguous()
        if not self._context.set_input_shape(name, tuple(moved.shape)):
            raise BatchError(f"input {tensor['name']} is {list(value.shape)}, which the engine refuses")
        self._address(name, moved)
        return moved

    def _allocated(self) -> dict[str, torch.Tensor]:
        """Allocate every output, and set the addresses of outputs and state. Returns {output binding: tensor}."""
        found: dict[str, torch.Tensor] = {}
        for pair in self.io["state"]:
            now = self.state[pair["name"]]
            self._context.set_input_shape(pair["input"], tuple(now.shape))
            self._address(pair["input"], now)
            if pair["in_place"]:
                found[pair["output"]] = now
        for name in self._names():
            if self._engine.get_tensor_mode(name) != self._trt.TensorIOMode.OUTPUT:
                continue
            if name not in found:
                shape = tuple(self._context.get_tensor_shape(name))
                found[name] = torch.empty(shape, dtype=self._types[name], device=self.device)
            self._address(name, found[name])
        return found

    def _address(self, name: str, value: torch.Tensor) -> None:
        # An empty tensor has a null pointer, which TensorRT does not take.
        held = value if value.numel() else torch.empty(1, dtype=value.dtype, device=value.device)
        self._context.set_tensor_address(name, held.data_ptr())


def read_io(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The folder, and the content of its `io.json`. Raises ArtifactError."""
    place = Path(folder)
    place = place.parent if place.is_file() else place
    try:
        content = json.loads((place / IO).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA or content["kind"] != "calibcast engine":
            raise ValueError(f"it is {content['kind']!r} of schema {content['schema']!r}, not of {SCHEMA}")
        for key in ("engine", "inputs", "outputs", "state", "library", "versions"):
            content[key]
        plain = content["engine"] not in ("", "..") and Path(content["engine"]).name == content["engine"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{place / IO} is not what calibcast export --engine writes: {error}") from error
    if not plain:
        raise ArtifactError(f"{place / IO} names an engine outside of its folder: {content['engine']!r}")
    return place, content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, without the package safetensors. Raises ArtifactError."""
    try:
        content = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        found, held = {}, 0
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                held += stop - start
                if not 0 <= start <= stop or held > len(content) - end:  # overlapping tensors take any memory
                    raise ValueError(f"tensor {name} lies at {start} to {stop}")
                data = content[end + start : end + stop]
                kind = _SAFETENSORS[entry["dtype"]]
                flat = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
                found[name] = flat.reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a readable file of tensors: {error}") from error


def _tensorrt(io: Mapping[str, Any]) -> Any:
    """TensorRT's Python module, of the flavour and version that built the engine. Raises MismatchError for another
    version."""
    library, wanted = io["library"], io["versions"].get(io["library"])
    if library not in _MODULES:
        raise ArtifactError(f"{IO} names the library {library!r}; known are {sorted(_MODULES)}")
    try:
        trt = importlib.import_module(_MODULES[library])
    except ImportError as error:
        raise BuildError(f"this engine runs with {library} {wanted}: pip install {library}=={wanted}") from error
    if wanted is not None and trt.__version__ != wanted:
        raise MismatchError(
            f"this engine was built with {library} {wanted}, and here is {trt.__version__}: an engine loads only under "
            f"the version that built it. pip install {library}=={wanted}, or build it again."
        )
    return trt


def _check_gpu(io: Mapping[str, Any], device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise BuildError("this engine needs a GPU, and torch sees none")
    least, name = io.get("least_compute_capability"), io.get("gpu")
    here = torch.cuda.get_device_capability(device)
    if least is not None and here < tuple(map(int, least.split("."))):
        raise MismatchError(f"this engine needs compute capability {least} or later, and here is {_gpu(device)}")
    if name is not None and name != torch.cuda.get_device_name(device):
        raise MismatchError(f"this engine was built for {name}, and here is {_gpu(device)}: build it on this GPU")


def _gpu(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _check_input(tensor: Mapping[str, Any], value: Any) -> None:
    """Raise BatchError unless `value` is a tensor of the right type, and of a size that the engine was built for."""
    name = tensor["name"]
    if not isinstance(value, torch.Tensor):
        raise BatchError(f"input {name} is a {type(value).__name__}, expected a tensor")
    if str(value.dtype) != f"torch.{tensor['dtype']}":
        raise BatchError(f"input {name} is {value.dtype}, expected torch.{tensor['dtype']}")
    low, high, shape = tensor["min"], tensor["max"], list(value.shape)
    if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
        raise BatchError(f"input {name} is {shape}, but the engine was built for {low} to {high}")
