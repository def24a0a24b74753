"""`verify`: judge an engine against the fp32 model on the user's data."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.errors import CalibcastError, MismatchError, require_kind
from calibcast.calib.execution import (
    ProgramRunner,
    input_structure,
    output_names,
    output_structure,
    require_program,
    tensors_of,
)
from calibcast.calib.graph import dtype_name, where
from calibcast.calib.plain_tensors import readable
from calibcast.calib.program_digests import inputs_hash
from calibcast.calib.random_draws import JUDGED, Draws, drawing_nodes
from calibcast.engines.judging.attribution import Attribution
from calibcast.engines.judging.bounds import Bounds
from calibcast.engines.judging.metrics import OutputError
from calibcast.engines.judging.names import in_order_of, leaf_names
from calibcast.engines.judging.report import SCHEMA, VerificationReport
from calibcast.engines.judging.shapes import may_be, sizes_by_data
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")
Metric = Callable[..., Any]


def verify(  # noqa: PLR0913 - the public contract
    engine: Callable[..., Any],
    program: ExportedProgram,
    dataloader: Iterable[Any],
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
    progress: bool = True,
    attribute: bool | None = None,
    carry_state: bool = False,
    bounds: Mapping[str, Any] | None = None,
) -> VerificationReport:
    """Run `engine` and the fp32 `program` on the same batches and compare every output, streaming.

    Use batches that calibration did not see; batches that it saw cause a warning. Where engine and program draw random
    numbers in PyTorch, they draw the same; the caller's generators are left as they were.

    Args:
        engine: an `Engine`, or anything called like the model.
        program: the reference, as exported. Runs where the engine runs.
        metrics: name -> function(engine_output, reference_output) or (engine_output, reference_output, batch), a
            number per batch; averaged over samples (the first dimension of the first input). Outputs come as host
            tensors, in the structure that the model returns; the batch as the dataloader gave it.
        attribute: also run the engine's cast graph in PyTorch on the same batches, to tell the plan's error from the
            engine's. None: where the engine is something other than its cast graph in PyTorch.
        carry_state: run the batches as a sequence: engine and program each go on from the buffers that they have
            written to, so that errors add up, until a batch is a `NewSequence`. Without it, both begin again with each
            batch. Either way the engine's own state is put back (`engine.reset()`).
        bounds: what the report is to be judged by, under the names that `VerificationReport.require` takes:
            {"min_sqnr_db": 40}. The report keeps them, and says whether it passes; nothing is raised.

    Raises:
        MismatchError: the engine's outputs have another structure or shape. Sizes that depend on the data, such as the
            number of detections, may differ: such an output is compared in the batches where they are the same.
        BatchError: as in `calibrate`.
        CalibcastError: a metric raised.
    """
    require_program(program)
    if not callable(engine):
        raise CalibcastError(f"engine is a {type(engine).__name__}. Give an Engine, or anything called like the model.")
    require_kind(metrics or {}, Mapping, "metrics", "Give {name: function(output, reference)}.", CalibcastError)
    wanted = Bounds.of(bounds or {})
    signature = signature_of(program)
    runner = ProgramRunner(program, getattr(engine, "device", None), carry_state=carry_state)
    comparison = _Comparison(engine, runner, dict(metrics or {}), _attribution(engine, runner, attribute))
    comparison.reset()
    with tqdm(numbered(dataloader, signature, transform, max_batches), "verify", unit="batch",
              disable=None if progress else True) as bar:  # fmt: skip
        for index, batch, flat in bar:
            if flat.begins or not carry_state:
                comparison.reset()
            comparison.update(index, batch, flat)
    comparison.reset()
    return comparison.report(wanted)


def _attribution(engine: Callable[..., Any], runner: ProgramRunner, asked: bool | None) -> Attribution | None:
    mixed = getattr(engine, "program", None)
    if asked and not isinstance(mixed, ExportedProgram):
        raise CalibcastError("attribute=True needs an Engine: its cast graph is what errors are told apart by")
    wanted = getattr(engine, "backend", "eager") != "eager" if asked is None else asked
    return (
        Attribution(mixed, runner.device, runner.carries_state)
        if wanted and isinstance(mixed, ExportedProgram)
        else None
    )


def _draws_of(engine: Callable[..., Any], program: ExportedProgram) -> Draws:
    """What is drawn in each batch. A function that is not an engine may draw where its program does not."""
    mixed = getattr(engine, "program", None)
    if not isinstance(mixed, ExportedProgram):
        return Draws(JUDGED)
    drawing = [name for one in (program, mixed) for name in drawing_nodes(one)]
    if drawing and getattr(engine, "backend", "eager") != "eager":
        warnings.warn(
            f"{drawing[0]} draws random numbers, and the engine draws others than the program: the report compares "
            "different draws. Give what is random as an input of the model.",
            stacklevel=4,
        )
    return Draws.of(program, mixed, stream=JUDGED)


class _Comparison:
    """What has been compared so far."""

    def __init__(
        self,
        engine: Callable[..., Any],
        runner: ProgramRunner,
        metrics: dict[str, Metric],
        attribution: Attribution | None,
    ) -> None:
        self._engine, self._runner, self._metrics, self._attribution = engine, runner, metrics, attribution
        self._program = runner.program
        self._names = leaf_names(output_structure(runner.program, range(len(output_names(runner.program)))))
        self._draws = _draws_of(engine, runner.program)
        self._errors = [OutputError(name) for name in output_names(runner.program)]
        self._by_data = sizes_by_data(runner.program)
        self._compared: set[int] = set()
        self._sums = dict.fromkeys(metrics, 0.0)
        self._samples = 0
        self._batches = 0
        self._reference_problem: str | None = None
        ranges = getattr(engine, "ranges", None)
        self._known = set() if ranges is None else set(ranges.calibration.input_hashes)
        self._reused = 0

    def reset(self) -> None:
        """Begin a new sequence: engine, program and cast graph from equal state."""
        for one in (self._engine, self._runner, self._attribution):
            if callable(reset := getattr(one, "reset", None)):
                reset()

    def update(self, index: int, batch: Any, flat: list[Any]) -> None:
        self._reused += bool(self._known) and inputs_hash(flat) in self._known
        flat = self._runner.to_device(flat)
        before = self._runner.state
        with self._draws.of_batch(index):
            reference = self._runner.run_batch(flat, index)
        # Copies: an engine that writes into its inputs would change a reference that shares their memory.
        given = [v.clone() if isinstance(v, torch.Tensor) else v for v in flat]
        args, kwargs = input_structure(self._program, given)
        with self._draws.of_batch(index):
            output = self._engine(*args, **kwargs)
        ours = self._flat_output(output, index)
        for position, (error, mine, theirs) in enumerate(zip(self._errors, ours, reference, strict=True)):
            if isinstance(theirs, torch.Tensor):
                self._compare(position, error, mine, theirs, index)
                self._compared.add(position)
            else:
                error.compare_plain(mine, theirs, index)
        if self._attribution is not None:
            with self._draws.of_batch(index):
                self._attribution.update(flat, ours, reference, index)
        if self._reference_problem is None and any(_has_nan(value) for value in reference):
            after = self._runner.state
            self._runner.restore(before)
            with self._draws.of_batch(index):
                self._reference_problem = _first_nonfinite(self._runner, flat, index)
            self._runner.restore(after)
        self._measure(index, output, output_structure(self._program, reference), batch, flat)
        self._batches += 1

    def _flat_output(self, output: Any, index: int) -> list[Any]:
        leaves, spec = pytree.tree_flatten(output)
        if len(leaves) != len(self._errors):
            raise MismatchError(
                f"batch {index}: the engine gives {len(leaves)} outputs ({spec}), the program {len(self._errors)}: "
                "this engine is of another model"
            )
        return in_order_of(self._names, output, leaves, f"batch {index}")

    def _compare(self, position: int, error: OutputError, mine: Any, theirs: torch.Tensor, index: int) -> None:
        if not isinstance(mine, torch.Tensor) or not may_be(mine.shape, theirs.shape, self._by_data[position]):
            came = list(mine.shape) if isinstance(mine, torch.Tensor) else type(mine).__name__
            raise MismatchError(
                f"batch {index}: {error.output} of the engine is {came}, of the program {list(theirs.shape)}"
            )
        if mine.is_complex() != theirs.is_complex():
            types = f"{dtype_name(mine.dtype)}, of the program {dtype_name(theirs.dtype)}"
            raise MismatchError(f"batch {index}: {error.output} of the engine is {types}")
        if theirs.device.type == "meta" or mine.device.type == "meta":
            raise MismatchError(f"batch {index}: {error.output} is on the meta device: it has no values to compare")
        error.update(readable(mine.to(theirs.device)), readable(theirs), index)

    def _measure(self, index: int, output: Any, reference: Any, batch: Any, flat: list[Any]) -> None:
        if not self._metrics:
            return
        samples = next((v.shape[0] for v in flat if isinstance(v, torch.Tensor) and v.dim()), 1)
        # On the host, where the labels of a batch usually are.
        output, reference = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), (output, reference))
        for name, metric in self._metrics.items():
            arguments = (output, reference, batch) if _takes_batch(metric) else (output, reference)
            try:
                self._sums[name] += float(metric(*arguments)) * samples
            except Exception as error:
                raise CalibcastError(
                    f"metric {name!r} raised {type(error).__name__} on batch {index}: {error}. It is called with "
                    "(engine_output, reference_output) or (engine_output, reference_output, batch) and gives a number."
                ) from error
        self._samples += samples

    def report(self, bounds: Bounds) -> VerificationReport:
        if self._reused:
            warnings.warn(
                f"{self._reused} of {self._batches} batches were also calibrated on: the report says how well the "
                "engine does on data that its plan has seen. Verify on held-out data.",
                stacklevel=3,
            )
        if self._reference_problem is not None:
            warnings.warn(f"the fp32 reference itself is not finite: {self._reference_problem}", stacklevel=3)
        errors = [error for i, error in enumerate(self._errors) if i in self._compared]
        report = VerificationReport(
            frame=pl.DataFrame([error.row() for error in errors], schema=SCHEMA),
            batches=self._batches,
            metrics={name: total / self._samples if self._samples else math.nan for name, total in self._sums.items()},
            problems=tuple(f"{error.output}: {error.problem}" for error in self._errors if error.problem),
            reference_problem=self._reference_problem,
            floating=tuple(error.output for error in errors if error.floating),
            attribution=None if self._attribution is None else self._attribution.frame(self._compared),
            bounds=bounds,
        )
        _log.info("%s", report)
        return report


def _has_nan(value: Any) -> bool:
    floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return floating and bool(torch.isnan(value).any())


def _takes_batch(metric: Metric) -> bool:
    try:
        parameters = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _first_nonfinite(runner: ProgramRunner, flat: list[Any], index: int) -> str:
    """Run a batch again, node by node, to name the first node whose result is NaN or Inf."""
    found: list[str] = []

    def watch(name: str, node: fx.Node, result: Any, _: Any) -> None:
        if found or node.op == "placeholder":
            return
        for _output, tensor in tensors_of(node, result):
            if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
                # -inf is a mask more often than an accident; NaN never is.
                if bool(torch.isnan(tensor).any()) or bool((tensor == math.inf).any()):
                    found.append(where(node, name))
                return

    runner.run(flat, watch)
    place = found[0] if found else "its inputs"
    return f"first in batch {index} at {place}. Mend the model or leave that batch out"
