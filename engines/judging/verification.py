"""`verify`: judge an engine against the fp32 model on the user's data."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.errors import CalibcastError, GateError, MismatchError, require_kind
from calibcast.calib.execution import (
    ProgramRunner,
    input_structure,
    output_names,
    output_structure,
    require_program,
    tensors_of,
)
from calibcast.calib.fingerprint import inputs_hash
from calibcast.calib.graph import where
from calibcast.engines.judging.attribution import Attribution
from calibcast.engines.judging.metrics import OutputError
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

_log = logging.getLogger("calibcast")
Metric = Callable[..., Any]
SCHEMA: dict[str, Any] = {
    "output": pl.String,
    "max_abs": pl.Float64,
    "mean_abs": pl.Float64,
    "rel_l2": pl.Float64,
    "sqnr_db": pl.Float64,
    "cosine": pl.Float64,
    "nonfinite": pl.Int64,
    "nonfinite_reference": pl.Int64,
    "top1": pl.Float64,
    "passing_atol": pl.Float64,
}


@dataclass(frozen=True, eq=False)
class VerificationReport:
    """Evidence, not a bool: how far each output is from the reference, over all batches.

    frame: one row per tensor output, with the columns of `SCHEMA`. metrics: the user's own, averaged over samples.
    attribution: whose error it is, as in `engines.judging.attribution`; None where that was not asked.
    problems: what makes the engine fail before any threshold. reference_problem: where fp32 itself is NaN or Inf.
    """

    frame: pl.DataFrame
    batches: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    reference_problem: str | None = None
    floating: tuple[str, ...] = field(default=(), repr=False)
    attribution: pl.DataFrame | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether the engine is finite wherever the reference is."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        title = f"VerificationReport: {self.batches} batches, {'passed' if self.passed else 'FAILED'}"
        header = f"  {'output':<20}{'max_abs':>11}{'rel_l2':>11}{'sqnr_db':>9}{'cosine':>11}{'top1':>8}  nonfinite"
        lines = [title, header]
        for row in self.frame.iter_rows(named=True):
            top1 = "" if row["top1"] is None else f"{row['top1']:.4f}"
            lines.append(
                f"  {row['output']:<20}{row['max_abs']:>11.3g}{row['rel_l2']:>11.3g}{row['sqnr_db']:>9.1f}"
                f"{row['cosine']:>11.7f}{top1:>8}{row['nonfinite']:>11}"
            )
        for row in () if self.attribution is None else self.attribution.iter_rows(named=True):
            lines.append(
                f"  {row['output']}: the plan alone {row['plan_sqnr_db']:.1f} dB, the engine against the plan "
                f"{row['engine_sqnr_db']:.1f} dB: to blame is {row['blame']}"
            )
        lines += [f"  {name}: {value:.6g}" for name, value in self.metrics.items()]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines + ([f"  reference: {self.reference_problem}"] if self.reference_problem else []))

    def require(
        self,
        min_sqnr_db: float | None = None,
        max_rel_l2: float | None = None,
        min_cosine: float | None = None,
        min_top1: float | None = None,
        max_abs: float | None = None,
        min_metrics: Mapping[str, float] | None = None,
    ) -> VerificationReport:
        """The gate: this report, or GateError with every bound that does not hold, and the numbers.

        An engine that is NaN or Inf where fp32 is finite never passes, nor does a reference that is NaN itself:
        nothing can be judged against it. Thresholds apply to floating-point outputs; a NaN statistic fails.
        """
        failures = list(self.problems)
        if self.reference_problem is not None:
            failures.append(
                f"the fp32 reference itself is not finite, so nothing can be judged: {self.reference_problem}"
            )
        bounds = (
            ("sqnr_db", "at least", min_sqnr_db),
            ("rel_l2", "at most", max_rel_l2),
            ("cosine", "at least", min_cosine),
            ("top1", "at least", min_top1),
            ("max_abs", "at most", max_abs),
        )
        for row in self.frame.iter_rows(named=True):
            for column, direction, bound in bounds:
                seen = row[column]
                if bound is None or seen is None or row["output"] not in self.floating:
                    continue
                if not (seen >= bound if direction == "at least" else seen <= bound):
                    failures.append(f"{row['output']}: {column} {seen:.6g}, required {direction} {bound:g}")
        for name, bound in (min_metrics or {}).items():
            if name not in self.metrics:
                raise CalibcastError(f"no metric {name!r} was given to verify; there are {sorted(self.metrics)}")
            if not self.metrics[name] >= bound:
                failures.append(f"metric {name} {self.metrics[name]:.6g}, required at least {bound:g}")
        if failures:
            raise GateError("the gate says no: " + "; ".join(failures), self)
        return self


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
) -> VerificationReport:
    """Run `engine` and the fp32 `program` on the same batches and compare every output, streaming.

    Use batches that calibration did not see: the same ones warn.

    Args:
        engine: an `Engine`, or anything called like the model.
        program: the reference, as exported. Runs where the engine runs.
        metrics: name -> function(engine_output, reference_output) or (engine_output, reference_output, batch), a
            number per batch; averaged over samples (the first dimension of the first input). Outputs come as host
            tensors, in the structure that the model returns; the batch as the dataloader gave it.
        attribute: also run the engine's cast graph in PyTorch on the same batches, to tell the plan's error from the
            engine's. None: where the engine is something other than its cast graph in PyTorch.
        carry_state: run the batches as a sequence: engine and program go on from what each of them has left in the
            buffers that it writes to, so that errors add up, until a batch is a `NewSequence`. Without, both begin
            anew with each batch. Either way the engine's own state is put back (`engine.reset()`).

    Raises:
        MismatchError: the engine's outputs have another structure or shape. BatchError: as in `calibrate`.
        CalibcastError: a metric raised.
    """
    require_program(program)
    require_kind(metrics or {}, Mapping, "metrics", "Give {name: function(output, reference)}.", CalibcastError)
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
    return comparison.report()


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
        self._errors = [OutputError(name) for name in output_names(runner.program)]
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
        reference = self._runner.run_batch(flat, index)
        args, kwargs = input_structure(self._program, flat)
        output = self._engine(*args, **kwargs)
        ours = self._flat_output(output, index)
        for position, (error, mine, theirs) in enumerate(zip(self._errors, ours, reference, strict=True)):
            if isinstance(theirs, torch.Tensor):
                self._compare(error, mine, theirs, index)
                self._compared.add(position)
        if self._attribution is not None:
            self._attribution.update(flat, ours, reference, index)
        if self._reference_problem is None and any(_has_nan(value) for value in reference):
            after = self._runner.state
            self._runner.restore(before)
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
        return leaves

    def _compare(self, error: OutputError, mine: Any, theirs: torch.Tensor, index: int) -> None:
        if not isinstance(mine, torch.Tensor) or mine.shape != theirs.shape:
            came = list(mine.shape) if isinstance(mine, torch.Tensor) else type(mine).__name__
            raise MismatchError(
                f"batch {index}: {error.output} of the engine is {came}, of the program {list(theirs.shape)}"
            )
        error.update(mine.to(theirs.device), theirs, index)

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

    def report(self) -> VerificationReport:
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
            metrics={name: total / self._samples for name, total in self._sums.items()},
            problems=tuple(f"{error.output}: {error.problem}" for error in errors if error.only_engine),
            reference_problem=self._reference_problem,
            floating=tuple(error.output for error in errors if error.floating),
            attribution=None if self._attribution is None else self._attribution.frame(self._compared),
        )
        _log.info("%s", report)
        return report


def _has_nan(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(torch.isnan(value).any())


def _takes_batch(metric: Metric) -> bool:
    try:
        parameters = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _first_nonfinite(runner: ProgramRunner, flat: list[Any], index: int) -> str:
    """Run a batch again, watched, to name the first node whose result is NaN or Inf."""
    found: list[str] = []

    def watch(name: str, node: fx.Node, result: Any, _: Any) -> None:
        if found or node.op == "placeholder":
            return
        for _output, tensor in tensors_of(node, result):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                # -inf is a mask more often than an accident; NaN never is.
                if bool(torch.isnan(tensor).any()) or bool((tensor == math.inf).any()):
                    found.append(where(node, name))
                return

    runner.run(flat, watch)
    place = found[0] if found else "its inputs"
    return f"first in batch {index} at {place}. Mend the model or leave that batch out"
