"""`export_onnx`: a cast program as an ONNX model on disk."""

from __future__ import annotations

import importlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.errors import ArtifactError, BuildError, StorageError, cause_of, first_line
from calibcast.calib.execution import require_program
from calibcast.calib.sealed_files import followed, is_special
from calibcast.engines.onnx_export.surface import name_everything, write_plan
from calibcast.engines.onnx_export.translation import Translation, drop_unused, translated
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram


def export_onnx(
    mixed: ExportedProgram,
    plan: PrecisionPlan | None,
    path: str | os.PathLike[str],
    translations: Mapping[Any, Callable[..., Any]] | None = None,
) -> Path:
    """Write `mixed` as a strongly typed ONNX model; returns where it is.

    The types are those of the graph, so TensorRT runs what the plan says with `--stronglyTyped`. Beside `model.onnx`
    stands `model.onnx.data` with the weights, and, for a program that writes to its buffers, `model.onnx.state.npz`:
    each such buffer is an input `NAME` and an output `NAME_next`, which the caller feeds back, and this is its content
    at the start. Both travel with the model. A user input that the program writes to has such an output, too. Inputs
    and outputs have the caller's names (`batch["ids"]` is `batch_ids`), dynamic sizes those of `torch.export.Dim` where
    the program was not loaded from a file.

    mixed: from `insert_casts`, or any exported program. plan: goes node by node, with reasons, into the model's
    metadata (`calibcast.plan`, JSON) and into that of its nodes; None for none. translations: for operators that ONNX
    does not have, such as your own: OpOverload -> a function of onnxscript with the same arguments, as
    `torch.onnx.export(custom_translation_table=)` takes them.

    Raises BuildError for an operator that ONNX does not have, a missing package (calibcast[onnx]), or a model that
    onnx's own checker refuses; ArtifactError when it cannot be written.
    """
    require_program(mixed, "mixed", "Give what insert_casts(program, plan) returns, or any exported program.")
    if Path(path).suffix != ".onnx":
        raise ArtifactError(f"{path}: the name of an ONNX model ends in .onnx")
    target = followed(path)
    if is_special(target):
        raise StorageError(f"cannot write {target}: it is a device or a pipe, and a model is several files")
    translation = translated(mixed, translations)
    state = name_everything(translation, mixed)
    drop_unused(translation.model)
    write_plan(translation, plan, state)
    _write(translation, state, target)
    return target


def _write(translation: Translation, state: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write the files and check them before they come to their place, the model last."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            folder = Path(name)
            _saved(translation.model, folder / target.name)
            if state:
                _save_state(state, folder / f"{target.name}.state.npz")
            _check(folder / target.name)
            # The old files go first: if the process ends in between, no old model has new weights.
            for suffix in (".data", ".state.npz", ""):
                (target.parent / f"{target.name}{suffix}").unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}") from error


def _saved(model: Any, path: Path) -> None:
    ir = importlib.import_module("onnx_ir")
    data = path.with_name(f"{path.name}.data")
    try:
        ir.save(model, path, external_data=data.name)
    except importlib.import_module("onnx_ir.serde").SerdeError as error:
        if isinstance(cause := cause_of(error), OSError):
            raise cause from error
        raise BuildError(f"ONNX cannot have this program: {type(cause).__name__}: {first_line(cause)}") from error
    if data.is_file() and not data.stat().st_size:
        data.unlink()  # every weight is so small that it stands in the model


def _save_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    numpy = importlib.import_module("numpy")
    # Written as numpy.savez does, whose own arguments (`file`) could not be names here.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in state.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                numpy.lib.format.write_array(member, value.cpu().numpy(), allow_pickle=False)


def _check(path: Path) -> None:
    """Raise BuildError unless onnx's checker, with its inference of shapes and types, takes the model."""
    checker = importlib.import_module("onnx.checker")
    try:
        checker.check_model(str(path), full_check=True)
    except Exception as error:  # onnx's errors have no base but Exception
        raise BuildError(f"onnx's checker refuses the model: {first_line(error)[:500]}") from error
