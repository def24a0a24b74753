"""What a plan runs in the low type. A proposal is taken or left by this alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calibcast.calib.ranges import RangeTable
from calibcast.passes.cast_count import CastCounter
from calibcast.passes.classification import classify, masked_nodes
from calibcast.passes.settings import Settings
from torch.export import ExportedProgram

# Gains below these shares of the whole do not count: more work in the low type, or more bytes of activations.
LEAST_WORK, LEAST_BYTES = 0.001, 0.05
# Of two gains, one that moves this much less is preferred; casts and added multiplications count.
LEAST_MOVED = 0.02
# dB by which the rounding noise of a tensor may grow: up to the first it is as good as none, and beyond the second a
# proposal is refused.
QUIET_DB, LOUDEST_DB = 6.0, 20.0


@dataclass(frozen=True)
class Judgement:
    """high: nodes in fp32. work_low, bytes_low: in the low type, as shares of all work and of all activation bytes.

    casts, bytes_cast: of the plan. cast, added: bytes of casts, and bytes that added multiplications read and write, as
    shares of all activation bytes.
    loss_db: by how much rounding noise grew, at the tensor where it grew most, as parts are too small for the type.
    """

    high: int
    work_low: float
    bytes_low: float
    casts: int
    bytes_cast: int
    cast: float = 0.0
    added: float = 0.0
    loss_db: float = 0.0

    def improves(self, other: Judgement) -> bool:
        """Whether it is preferred to another gain: a quiet one to one that is not, then the larger."""
        if self.quiet != other.quiet:
            return self.quiet
        if abs(self.work_low - other.work_low) >= LEAST_WORK:
            return self.work_low > other.work_low
        return self.net_bytes - self.cast >= other.net_bytes - other.cast + LEAST_MOVED

    @property
    def quiet(self) -> bool:
        """Whether the rounding noise of no tensor grew much."""
        return self.loss_db <= QUIET_DB

    def beats(self, other: Judgement) -> bool:
        """Whether it is a real gain, and nowhere a loss."""
        if self.work_low < other.work_low - 1e-9 or self.net_bytes < other.net_bytes - LEAST_WORK:
            return False
        return self.work_low >= other.work_low + LEAST_WORK or self.net_bytes >= other.net_bytes + LEAST_BYTES

    @property
    def net_bytes(self) -> float:
        """The share of bytes in the low type, less that of the multiplications that were added for it."""
        return self.bytes_low - self.added

    def __str__(self) -> str:
        return f"{self.high} fp32 nodes, {self.work_low:.1%} of the work low, {self.bytes_cast} bytes cast"


def judged(
    program: ExportedProgram,
    ranges: RangeTable,
    low_type: object,
    settings: Settings,
    loss_db: Callable[[frozenset[str]], float] | None = None,
) -> Judgement:
    """Judge the plan that `classify` makes from these ranges, and the casts that `insert_casts` would insert for it.

    loss_db: gives, for the nodes that run low, by how much rounding noise grew.
    """
    options = vars(settings)
    plan = classify(program, ranges, low_type, weights="ignore", **options)  # type: ignore[arg-type]
    counter = CastCounter(program, masks=masked_nodes(ranges))
    counted = counter.count(plan.low_precision_nodes, plan.low_precision_type)
    work = {row.node: row.work for row in plan.decisions if row.precision != "kept"}
    low = sum(work[name] for name in plan.low_precision_nodes)
    whole = sum(work.values())
    size = counter.activation_bytes or 1
    return Judgement(
        high=len(plan.high_precision_nodes),
        work_low=low / whole if whole else 0.0,
        bytes_low=counted.activation_bytes_low / size,
        casts=counted.casts,
        bytes_cast=counted.bytes_cast,
        cast=counted.bytes_cast / size,
        loss_db=0.0 if loss_db is None else loss_db(frozenset(plan.low_precision_nodes)),
    )
