"""Programs as `.pt2`, changed by hand as an attacker would: what torch would run if nobody looked."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


@dataclass
class Pair:
    """Inputs of a model as a class of the user's."""

    left: torch.Tensor
    right: torch.Tensor


torch.export.register_dataclass(Pair, serialized_type_name="tests.Pair")


class Net(nn.Module):
    """Dynamic sizes, a dict, a dataclass, a literal, a region, control flow, and a size that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scales = nn.ParameterDict({"of-left": nn.Parameter(torch.ones(4))})
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, pair: Pair, more: dict[str, torch.Tensor], mode: str = "fast") -> dict[str, torch.Tensor]:
        found = self.linear(pair.left) * pair.right * self.scales["of-left"] + more["a b"].sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = found @ found.transpose(0, 1) / found.shape[0]
        found = torch.cond(found.sum() > 0, lambda x: x + 1.0, lambda x: x - 1.0, (found.float(),))
        return {"sum": found + (1 if mode == "fast" else 2), "positive": (found > 0).nonzero()}


def save_net(path: Path) -> tuple[torch.export.ExportedProgram, tuple[Any, ...]]:
    """Export the net to `path`; the program and its arguments."""
    torch.manual_seed(0)
    rows = Dim("rows", min=2, max=64)
    args = (Pair(torch.randn(8, 4), torch.ones(8, 1)), {"a b": torch.randn(6)}, "fast")
    shapes = ([{0: rows}, {0: rows}], {"a b": {0: 2 * Dim("half", min=2, max=9)}}, None)
    program = torch.export.export(Net().eval(), args, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return program, args


def rewritten(source: Path, target: Path, changes: Mapping[str, bytes | None]) -> Path:
    """A copy of an archive with some members put in place, added, or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        contents: dict[str, bytes | None] = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        contents |= changes
        for name, content in contents.items():
            if content is not None:
                new.writestr(f"{root}/{name}", content)
    return target


def changed_json(source: Path, target: Path, change: Callable[[Any], None], member: str = MODEL) -> Path:
    """A copy of an archive whose JSON document `member` went through `change`."""
    with zipfile.ZipFile(source) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(member)]
        document = json.loads(archive.read(name))
    change(document)
    return rewritten(source, target, {member: json.dumps(document).encode()})


class Commands:
    """An object whose pickle runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved(value: Any, protocol: int = 2) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol)
    return stream.getvalue()


def with_pickle(pickle: bytes) -> bytes:
    """An archive of `torch.save` around any pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()
