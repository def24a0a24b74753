"""How far an engine's output is from the reference: `TensorErrors`, and further measures that only outputs have."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from calibcast.engines.judging.channel_errors import ChannelErrors
from calibcast.passes.tensor_errors import TensorErrors, decibels

# The relative part of a tolerance; `passing_atol` is the absolute part that passes beside it. This is the default of
# torch.testing.assert_close for float16.
RTOL = 1e-3


@dataclass(slots=True)
class OutputError:
    """Running comparison of one output with its reference.

    Differences are over elements that are finite in both. Elements that are not finite are counted; where both have the
    same (both NaN, or the same infinity), that is no fault of the engine. unlike: batches of another shape.
    """

    output: str
    floating: bool = True
    sum_abs: float = 0.0
    engine_squares: float = 0.0
    product: float = 0.0
    only_engine: int = 0
    passing_atol: float = 0.0
    rows: int = 0
    agreeing: int = 0
    equal: int = 0
    all_elements: int = 0
    unlike: int = 0
    problem: str = field(default="")
    channels: ChannelErrors = field(default_factory=ChannelErrors)
    _errors: TensorErrors | None = None  # made on the device of the first batch

    def update(self, engine: torch.Tensor, reference: torch.Tensor, batch: int) -> None:
        """Add one batch. If its shape is not that of the reference, it is counted and not compared."""
        if engine.shape != reference.shape:
            self.unlike += 1
            return
        self.floating = reference.dtype.is_floating_point or reference.dtype.is_complex
        self._count_rows(engine, reference)
        if self._errors is None:
            self._errors = TensorErrors(1, reference.device)
        self._errors.update(0, engine, reference, batch)
        ours, theirs = _wide(engine), _wide(reference)
        finite_ours = torch.isfinite(ours)
        self._hold_nonfinite(ours, theirs, finite_ours, batch)
        both = finite_ours & torch.isfinite(theirs)
        self._accumulate(ours[both], theirs[both])
        if self.floating and not reference.is_complex():
            self.channels.update(engine, reference)
        self.all_elements += reference.numel()
        self.equal += 0 if self.floating else int((engine == reference).sum())

    def compare_plain(self, engine: Any, reference: Any, batch: int) -> None:
        """One batch of an output that is no tensor in the program: a number, a text or None, which must be equal. A
        float may be off by 1%, as it was computed."""
        mine = engine.item() if isinstance(engine, torch.Tensor) and engine.numel() == 1 else engine
        floats = isinstance(mine, float) and isinstance(reference, float)
        if self.problem or mine is reference or (floats and math.isclose(mine, reference, rel_tol=0.01)):
            return
        if isinstance(mine, torch.Tensor) or not (mine == reference or (mine != mine and reference != reference)):
            came = f"a tensor {list(mine.shape)}" if isinstance(mine, torch.Tensor) else repr(mine)
            self.problem = f"{came} in batch {batch}, where the program gives {reference!r}"

    def _hold_nonfinite(self, ours: torch.Tensor, theirs: torch.Tensor, finite: torch.Tensor, batch: int) -> None:
        """Count elements that are NaN or Inf where the reference is finite or a different one: -inf for +inf, NaN for
        inf."""
        same = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
        wrong = ~finite & ~same
        count, alone = int(wrong.sum()), int((wrong & torch.isfinite(theirs)).sum())
        if count and not self.only_engine:
            problems = [f"{alone} NaN or Inf in batch {batch} where the reference is finite"] if alone else []
            if count > alone:
                problems.append(f"{count - alone} NaN or Inf in batch {batch} where the reference has another")
            self.problem = ", ".join(problems)
        self.only_engine += count

    def _accumulate(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if not ours.numel():
            return
        difference = (ours - theirs).abs()
        self.sum_abs += float(difference.sum())
        self.engine_squares += float(torch.dot(ours, ours))
        self.product += float(torch.dot(ours, theirs))
        self.passing_atol = max(self.passing_atol, float((difference - RTOL * theirs.abs()).max()))

    def _count_rows(self, engine: torch.Tensor, reference: torch.Tensor) -> None:
        if reference.is_floating_point() and reference.dim() >= 2 and reference.size(-1) >= 2 and reference.numel():
            ours = engine.to(torch.uint8) if engine.dtype == torch.bool else engine
            self.agreeing += int((ours.argmax(-1) == reference.argmax(-1)).sum())
            self.rows += reference.numel() // reference.size(-1)

    def row(self) -> dict[str, Any]:
        """The columns of `VerificationReport.frame`, which says what they are."""
        found = {} if self._errors is None else {name: values[0] for name, values in self._errors.columns().items()}
        return {
            "output": self.output,
            "max_abs": found.get("max_abs", 0.0),
            "mean_abs": self.sum_abs / self.elements if self.elements else math.nan,
            "rel_l2": self.rel_l2,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "nonfinite": found.get("nonfinite", 0),
            "nonfinite_reference": found.get("nonfinite_reference", 0),
            "top1": self.agreeing / self.rows if self.rows else None,
            "passing_atol": self.passing_atol,
            **self._by_channel(),
            "equal": None if self.floating else self.equal / self.all_elements if self.all_elements else math.nan,
            "unlike": self.unlike,
        }

    def _by_channel(self) -> dict[str, Any]:
        if not self.floating:
            return dict.fromkeys(("variation_db", "worst_channel_db", "worst_variation_db", "worst_channel"))
        worst, channel = self.channels.worst_variation
        return {
            "variation_db": self.channels.variation_db,
            "worst_channel_db": self.channels.worst_channel[0],
            "worst_variation_db": worst,
            "worst_channel": channel,
        }

    @property
    def elements(self) -> int:
        """How many elements were finite in both."""
        return 0 if self._errors is None else self._errors.compared(0)

    @property
    def powers(self) -> tuple[float, float]:
        """Sums of squares over the elements that are finite in both: of the difference, and of the reference."""
        return (0.0, 0.0) if self._errors is None else self._errors.powers(0)

    @property
    def rel_l2(self) -> float:
        """||engine - reference|| / ||reference||; 0 when equal, inf when only the reference is zero."""
        return math.nan if self._errors is None else self._errors.relative(0)

    @property
    def sqnr_db(self) -> float:
        """10 log10(||reference||^2 / ||engine - reference||^2), dB; inf when equal; NaN when nothing was finite."""
        return decibels(self.rel_l2)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, over all elements of all batches; 1 when they are equal."""
        noise, reference_squares = self.powers
        if noise == 0.0:
            return 1.0
        norms = math.sqrt(self.engine_squares * reference_squares)
        if norms == 0.0:
            return 0.0
        return min(1.0, max(-1.0, self.product / norms))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.detach().reshape(-1).to(torch.float64)
