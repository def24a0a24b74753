"""All checks of a `.pt2` before torch loads it."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

from calibcast.calib.pt2.archive import members
from calibcast.calib.pt2.document import check_value, parse_document
from calibcast.calib.pt2.refusal import RefusedError, shown
from calibcast.calib.pt2.saved_tensors import check_saved

_MODEL = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {
    f"{_WEIGHTS}model_weights_config.json": (_WEIGHTS, re.compile(r"weight_\d{1,9}")),
    f"{_CONSTANTS}model_constants_config.json": (_CONSTANTS, re.compile(r"tensor_\d{1,9}")),
}
_OTHERS = frozenset(
    (_SAMPLES, "archive_format", "archive_version", "byteorder", "version", ".format_version", ".storage_alignment")
)
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
_LOOK_ELSEWHERE = (
    "Whoever trusts the file loads it with torch.export.load in a function of their own, and gives file.py:function "
    "instead of the file"
)


def check_program_file(path: Path) -> None:
    """Raise RefusedError unless torch can load the `.pt2` at `path` without running code that the file brings along.

    torch's own archive reader reads every record, so torch cannot read anything else later. Raises OSError,
    zipfile.BadZipFile or ValueError for a file that is not the archive of a program.
    """
    sizes = members(path)
    if _MODEL not in sizes:
        raise _missing(sizes)
    reader = _opened(str(path))
    if set(reader.get_all_records()) != set(sizes):
        raise RefusedError("an archive that zipfile and torch read differently")
    for name in sizes:
        _check_member(name)
    parse_document(reader.get_record(_MODEL), "ExportedProgram")
    for config, (folder, names) in _CONFIGS.items():
        if config in sizes:
            document = parse_document(reader.get_record(config), "PayloadConfig")
            for entry in document.get("config", {}).values():
                _check_payload(entry, folder, names, sizes)
    samples = reader.get_record(_SAMPLES) if sizes.get(_SAMPLES) else b""
    if samples:
        check_saved(samples, lambda content: _opened(io.BytesIO(content)), _check_tensor_meta)


def _opened(source: Any) -> Any:
    import torch

    try:
        return torch._C.PyTorchFileReader(source)
    except RuntimeError as error:
        raise zipfile.BadZipFile(str(error).splitlines()[0]) from error


def _missing(sizes: dict[str, int]) -> Exception:
    if any(name.startswith("data/aotinductor/") for name in sizes):
        return RefusedError(f"compiled code (AOTInductor) and no exported program. {_LOOK_ELSEWHERE}")
    return ValueError(f"no {_MODEL} in it: torch.export.save of torch 2.8 or later did not write it")


def _check_member(name: str) -> None:
    if name in _OTHERS or name in _CONFIGS or name == _MODEL or _TENSOR.fullmatch(name):
        return
    if name.startswith((".data/", "extra/")):
        return
    raise RefusedError(
        f"member {shown(name)}: neither a program nor its tensors (compiled code, a custom object, or weights of an "
        f"old format). {_LOOK_ELSEWHERE}"
    )


def _check_payload(entry: dict[str, Any], folder: str, names: re.Pattern[str], sizes: dict[str, int]) -> None:
    name, meta = entry.get("path_name", ""), entry.get("tensor_meta")
    if entry.get("use_pickle") or meta is None or not names.fullmatch(name):
        raise RefusedError(
            f"{folder}{name} is pickled (a tensor of a class of its own, or a custom object), and a pickle can run "
            f"code. {_LOOK_ELSEWHERE}"
        )
    held = sizes.get(f"{folder}{name}")
    if held is None:
        raise RefusedError(f"{folder}{name} is missing")
    shape, strides = _numbers(meta["sizes"]), _numbers(meta["strides"])
    (offset,) = _numbers([meta["storage_offset"]])
    if len(shape) != len(strides):
        raise RefusedError(f"{folder}{name} has the shape {shown(shape)} and the strides {shown(strides)}")
    needed = 0 if 0 in shape else 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if needed * _width(meta["dtype"]) > held:
        raise RefusedError(f"{folder}{name} declares the shape {shown(shape)}, and the archive holds {held} bytes")


def _numbers(values: list[Any]) -> list[int]:
    numbers = [value.get("as_int") if isinstance(value, dict) else None for value in values]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise RefusedError(f"the sizes {shown(values)} of a stored tensor, which are no numbers")
    return [number for number in numbers if number is not None]


def _width(dtype: int) -> int:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE as DTYPES

    if dtype not in DTYPES:
        raise RefusedError(f"the element type {shown(dtype)} of a stored tensor")
    return int(DTYPES[dtype].itemsize)


def _check_tensor_meta(meta: Any) -> None:
    from torch._export.serde import schema

    check_value(meta, schema.TensorMeta)
