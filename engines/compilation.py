"""`compile`: all stages in one call, with the arguments and the three modes of Torch-TensorRT's proposal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import BuildError, ProgramError, SettingError
from calibcast.calib.training_mode import refuse_training
from calibcast.engines.backends import chosen, start_early
from calibcast.engines.building import build
from calibcast.engines.engine import Engine
from calibcast.engines.lstm_states import right_lstm_states
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.rescaling import rescale as rescale_program
from calibcast.passes.settings import low_type_of
from calibcast.passes.tuning import tune
from torch.export import ExportedProgram

# Arguments that `compile` itself gives to the stages. From the caller's other arguments, each stage gets those that its
# signature names.
_OWN = frozenset(
    {"program", "ranges", "dataloader", "transform", "device", "plan", "mod", "args", "mixed", "backend"}
) | {
    "batches",
    "reference",
}


def compile(  # noqa: PLR0913 - the proposal's own name and arguments
    model: torch.nn.Module | ExportedProgram,
    inputs: Sequence[Any],
    use_explicit_typing: bool = True,
    enable_autocast: bool = True,
    low_precision_type: torch.dtype | str = torch.float16,
    nodes_to_exclude: Iterable[str] = (),
    targets_to_exclude: Iterable[Any] = (),
    data_max: float | None = None,
    max_depth_of_reduction: int | None = None,
    calibration_dataloader: Iterable[Any] | None = None,
    transform: Callable[[Any], Any] | None = None,
    backend: str = "auto",
    rescale: str = "off",
    prove_batches: int = 8,
    **settings: Any,
) -> Engine:
    """Export, calibrate, classify, prove, cast and build.

    use_explicit_typing and enable_autocast: (True, True) calibrates and inserts casts; (True, False) builds the graph's
    own types; (False, False) is weak typing, where the installed TensorRT still has it; (False, True) is an error.
    Without `calibration_dataloader`, only rules that need no ranges decide, and the plan says so.

    Args:
        model: a module in eval mode, or an exported program (then `inputs` is not used).
        inputs: positional example inputs for the export, which also gets `kwargs=`, `dynamic_shapes=` and `strict=`.
        rescale: "auto" scales stored tensors by powers of two where that lets more run in the low type; see
            `passes.rescale`. It needs calibration data. "off" leaves the program as it is.
        prove_batches: where rounding was measured, the plan is run on this many of the first calibration batches, and
            mended until it meets `min_sqnr_db`: see `tune`. 0: it is not run. With `carry_state=True`, as for
            `calibrate`, they are run as a sequence.
        settings: further arguments of `torch.export.export`, `calibrate`, `classify`, `insert_casts` and `build`, by
            name, and settings of the backend. Each argument goes to every stage that has it.

    Raises:
        ProgramError: the model cannot be exported. BuildError: a mode that does not exist, or the builder failed.
        BudgetError: no plan meets the budget. Other errors: as the stages raise them.
    """
    if enable_autocast and not use_explicit_typing:
        raise BuildError(
            "enable_autocast=True needs use_explicit_typing=True: autocast writes types into the graph, and only an "
            "explicitly typed network keeps to them"
        )
    if rescale not in {"auto", "off"}:
        raise SettingError(f"rescale={rescale!r}: known are 'auto' and 'off'")
    low_type = low_type_of(low_precision_type)
    stages = (torch.export.export, calibrate, classify, insert_casts)
    to_export, to_calibrate, to_classify, to_cast = (_taken(settings, stage) for stage in stages)
    settings = {name: value for name, value in settings.items() if name in _names(build) or not _taken_by(name, stages)}
    start_early(backend, bool(settings.get("ahead_of_time")), bool(settings.get("isolate", True)))
    program = _exported(model, inputs, to_export)
    refuse_training(program)
    if not enable_autocast:
        if not use_explicit_typing:
            _require_tensorrt(backend)
            settings["weakly_typed"] = frozenset({torch.float32, low_type})
        return build(program, PrecisionPlan.from_types(program), backend=backend, **settings)
    ranges, first = None, First(() if calibration_dataloader is None else calibration_dataloader, max(prove_batches, 2))
    if calibration_dataloader is not None:
        device = settings.get("device")
        ranges = calibrate(program, first, transform=transform, device=device, **to_calibrate)
    to_classify |= {
        "low_precision_type": low_type,
        "data_max": data_max,
        "max_depth_of_reduction": max_depth_of_reduction,
        "nodes_to_exclude": nodes_to_exclude,
        "targets_to_exclude": targets_to_exclude,
    }
    original = program
    to_run = {"device": settings.get("device"), "carry_state": to_calibrate.get("carry_state", False)}
    if rescale == "auto" and ranges is not None:
        fitted = rescale_program(program, ranges, dataloader=first.kept, transform=transform, **to_run, **to_classify)
        program, ranges = fitted.program, fitted.ranges
    if ranges is not None and ranges.rounding.height and prove_batches > 0:
        plan = tune(program, ranges, first.kept[:prove_batches], transform=transform, **to_run, **to_classify)
    else:
        plan = classify(program, ranges, **to_classify)
    # If the data came as an iterator, it is used up; the batches in `first.kept` can be run again.
    to_try: dict[str, Any] = {"batches": first.kept, "transform": transform, "reference": original}
    return build(insert_casts(program, plan, **to_cast), plan, ranges, backend=backend, **to_try, **settings)


class First:
    """Passes batches on and keeps the first `most` of them, since an iterator gives each batch only once."""

    def __init__(self, batches: Iterable[Any], most: int) -> None:
        self._batches, self._most = batches, most
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        self.kept = []
        for batch in self._batches:
            if len(self.kept) < self._most:
                self.kept.append(batch)
            yield batch


def _names(stage: Callable[..., Any]) -> frozenset[str]:
    """The names of a stage's arguments that the caller of `compile` may give."""
    named = {p.name for p in inspect.signature(stage).parameters.values() if p.kind is not p.VAR_KEYWORD}
    return frozenset(named) - _OWN - set(inspect.signature(compile).parameters)


def _taken(settings: dict[str, Any], stage: Callable[..., Any]) -> dict[str, Any]:
    return {name: settings[name] for name in _names(stage) & set(settings)}


def _taken_by(name: str, stages: Iterable[Callable[..., Any]]) -> bool:
    return any(name in _names(stage) for stage in stages)


def _exported(model: Any, inputs: Sequence[Any], options: dict[str, Any]) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, torch.nn.Module):
        raise ProgramError(f"model is a {type(model).__name__}; give a torch.nn.Module or an ExportedProgram")
    args = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    try:
        with right_lstm_states():
            return torch.export.export(model, args, **options)
    except Exception as error:  # errors of torch.export have no common base class
        raise ProgramError(
            f"torch.export cannot export the model: {type(error).__name__}: {error}. "
            "See torch.export.draft_export(model, args) for a report of what stands in the way."
        ) from error


def _require_tensorrt(backend: str) -> None:
    found, why = chosen(backend)
    if found.name != "tensorrt":
        raise BuildError(
            f"weak typing (use_explicit_typing=False) is TensorRT's choice of types at build time, and the backend is "
            f"{found.name} ({why}). Use use_explicit_typing=True, enable_autocast=True."
        )
