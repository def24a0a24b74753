"""One call as a file: its tensors as safetensors, and JSON that says how they and plain data form the arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.artifacts import written_whole
from calibcast.calib.errors import ArtifactError, CalibcastError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_STRUCTURE, _VERSION = "calibcast.call", 1
_HEADER, _ENTRY = 512, 256
_PLAIN = (bool, int, float, str, type(None))


def save_call(path: Path, begins: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Write a call, and return the file's size in bytes. begins: whether a new sequence begins with this call."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _told((args, dict(kwargs)), tensors, "the call")
    text = json.dumps({"version": _VERSION, "begins": begins, "call": structure})
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={_STRUCTURE: text})
    return path.stat().st_size


def size_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The most bytes that a call's file can take: those of its tensors, and room for each name, shape and place."""
    leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _HEADER + _ENTRY * len(leaves)


def load_call(path: Path) -> tuple[bool, tuple[Any, ...], dict[str, Any]]:
    """Read a call: whether a new sequence begins, its arguments, its keyword arguments. Raises ArtifactError."""
    try:
        with safe_open(str(path), "pt") as stream:
            found = json.loads((stream.metadata() or {})[_STRUCTURE])
            if found["version"] != _VERSION:
                raise ArtifactError(f"{path} was written by another calibcast: record the calls again")
            args, kwargs = _made(found["call"], stream, set())
            return bool(found["begins"]), args, kwargs
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a readable recorded call (truncated or foreign): {error!r}") from error


def _told(value: Any, tensors: dict[str, torch.Tensor], at: str) -> Any:
    """A value as JSON. Copies of its tensors, on the host, are added to `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise CalibcastError(f"{at}: a dict whose keys are not text cannot be recorded")
        return {"dict": {key: _told(item, tensors, f"{at}[{key!r}]") for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_told(item, tensors, f"{at}[{number}]") for number, item in enumerate(value)]}
    raise CalibcastError(
        f"{at} is a {type(value).__name__}, which cannot be recorded: tensors, numbers, text, None, and tuples, lists "
        "and dicts of these can"
    )


def _made(told: Any, stream: Any, used: set[str]) -> Any:
    """The value that `_told` described. used: tensors read so far; each is read once, as often as it was written."""
    ((kind, content),) = told.items()
    if kind == "tensor":
        if content in used:
            raise ValueError(f"tensor {content} is used twice")
        used.add(content)
        return stream.get_tensor(content)
    if kind == "plain":
        return content
    if kind == "dict":
        return {key: _made(item, stream, used) for key, item in content.items()}
    if kind in {"tuple", "list"}:
        items = [_made(item, stream, used) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dtype" and isinstance(found := getattr(torch, content, None), torch.dtype):
        return found
    if kind == "device":
        return torch.device(content)
    raise ValueError(f"{kind} {content}")
