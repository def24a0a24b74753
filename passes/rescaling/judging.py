"""What a plan runs in the low type: by this, and by nothing of its own, a proposal is taken or left."""

from __future__ import annotations

from dataclasses import dataclass

from calibcast.calib.ranges import RangeTable
from calibcast.passes.cast_count import CastCounter
from calibcast.passes.classification import classify, masked_nodes
from calibcast.passes.settings import Settings
from torch.export import ExportedProgram

# A gain below these shares of the whole is none: more work in the low type, or more bytes of activations.
LEAST_WORK, LEAST_BYTES = 0.001, 0.05


@dataclass(frozen=True)
class Judgement:
    """high: nodes in fp32. work_low, bytes_low: in the low type, as shares of all work and of all activation bytes.

    casts, bytes_cast: of the plan. added: bytes that added multiplications read and write, as a share of the latter.
    """

    high: int
    work_low: float
    bytes_low: float
    casts: int
    bytes_cast: int
    added: float = 0.0

    def beats(self, other: Judgement) -> bool:
        """Whether it is a real gain, and nowhere a loss."""
        if self.work_low < other.work_low - 1e-9 or self.net_bytes < other.net_bytes - LEAST_WORK:
            return False
        return self.work_low >= other.work_low + LEAST_WORK or self.net_bytes >= other.net_bytes + LEAST_BYTES

    @property
    def net_bytes(self) -> float:
        """Bytes in the low type, less what is spent to have them there."""
        return self.bytes_low - self.added

    def __str__(self) -> str:
        return f"{self.high} fp32 nodes, {self.work_low:.1%} of the work low, {self.bytes_cast} bytes cast"


def judged(program: ExportedProgram, ranges: RangeTable, low_type: object, settings: Settings) -> Judgement:
    """By `classify` on these ranges, and the casts that `insert_casts` would make of it."""
    options = vars(settings)
    plan = classify(program, ranges, low_type, weights="ignore", **options)  # type: ignore[arg-type]
    counter = CastCounter(program, masks=masked_nodes(ranges))
    counted = counter.count(plan.low_precision_nodes, plan.low_precision_type)
    work = {row.node: row.work for row in plan.decisions if row.precision != "kept"}
    low = sum(work[name] for name in plan.low_precision_nodes)
    whole = sum(work.values())
    bytes_low = counted.activation_bytes_low / counter.activation_bytes if counter.activation_bytes else 0.0
    return Judgement(
        len(plan.high_precision_nodes), low / whole if whole else 0.0, bytes_low, counted.casts, counted.bytes_cast
    )
