"""What a plan records about rounding: what the table predicted, and what a run showed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibcast.calib.number_text import counted


@dataclass(frozen=True)
class EdgeCost:
    """An edge and the SQNR, dB, that is left when it alone is rounded. Names are those of `ranges.rounding`."""

    node: str
    input: str
    output: int
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.input} -> {self.node}: {self.sqnr_db:.1f} dB"


@dataclass(frozen=True)
class RoundingSummary:
    """What the table of measured edges predicts for a plan.

    min_sqnr_db: the budget. predicted_sqnr_db: at the worst output. spread: the budget is not met, and no single edge
    is to blame. edges: those that cost most under the plan, worst first.
    """

    min_sqnr_db: float
    predicted_sqnr_db: float
    spread: bool = False
    edges: tuple[EdgeCost, ...] = ()

    @classmethod
    def loaded(cls, row: Mapping[str, Any]) -> RoundingSummary:
        """The summary from its `asdict`."""
        return cls(**{**row, "edges": tuple(EdgeCost(**edge) for edge in row["edges"])})

    def __str__(self) -> str:
        worst = f"; most of it: {self.edges[0]}" if self.edges else ""
        return f"budget {self.min_sqnr_db:g} dB, predicted {self.predicted_sqnr_db:.1f} dB{worst}"


@dataclass(frozen=True)
class Proof:
    """What running a plan has shown. The run uses fp32 kernels and rounds where the plan is low.

    min_sqnr_db: the budget, of each channel of each output in each batch. sqnr_db: the least SQNR, found in
    `worst_batch`, at `worst_output`, in its channel `worst_channel`. doubled_sqnr_db: the least with floating-point
    inputs times two. outputs: the least SQNR of each floating-point output. places: which outputs of the program these
    are; empty in proofs of earlier versions. integers_changed: the largest share of the elements of an
    integer or boolean output that differed, over all batches. nonfinite: elements that are NaN or Inf only under the
    plan. batches: how many were run. runs: how many plans were run to find one that meets the budget; relaxing_runs:
    how many more, for one with more in the low type. carry_state: whether the batches were run as sequences, so that
    errors in what the program keeps between calls add up.
    """

    min_sqnr_db: float
    sqnr_db: float
    worst_batch: int | None
    worst_output: int | None
    worst_channel: int | None
    doubled_sqnr_db: float
    outputs: tuple[float, ...] = ()
    integers_changed: float = 0.0
    nonfinite: int = 0
    batches: int = 0
    runs: int = 1
    carry_state: bool = False
    places: tuple[int, ...] = ()
    relaxing_runs: int = 0

    @classmethod
    def loaded(cls, row: Mapping[str, Any]) -> Proof:
        """The proof from its `asdict`."""
        return cls(**{**row, "outputs": tuple(row["outputs"]), "places": tuple(row.get("places", ()))})

    def sqnr_by_place(self, floating: Sequence[int]) -> dict[int, float]:
        """The least SQNR of each output, by its place among all outputs of the program.

        floating: the places of the floating-point outputs, in order, for a proof that does not say its own.
        """
        return dict(zip(self.places or floating, self.outputs, strict=False))

    def __str__(self) -> str:
        place = "" if self.worst_output is None else f" (batch {self.worst_batch}, output {self.worst_output}"
        place += "" if not place else "" if self.worst_channel is None else f", channel {self.worst_channel}"
        place += ")" if place else ""
        runs = counted(self.runs, "run") + (f", and {self.relaxing_runs} to relax it" if self.relaxing_runs else "")
        how = " in sequence" if self.carry_state else ""
        # Inputs without a floating-point tensor cannot be doubled.
        doubled = "" if self.doubled_sqnr_db == math.inf else f", {self.doubled_sqnr_db:.1f} dB with inputs times two"
        return (
            f"proven on {counted(self.batches, 'batch')}{how}: at least {self.sqnr_db:.1f} dB{place}{doubled}; "
            f"the budget is {self.min_sqnr_db:g} dB; {runs}"
        )


def as_rows(value: RoundingSummary | Proof | None) -> dict[str, Any] | None:
    """As a dict, for JSON."""
    return None if value is None else asdict(value)
