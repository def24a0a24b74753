"""What a job reports about suspicious data: non-finite, constant and failing batches, by number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from calibcast.calib.batches import Signature
from calibcast.calib.errors import GateError
from calibcast.engines.job.settings import Limits

# How many numbers and messages of each kind are kept. More are only counted, so that memory stays bounded.
MOST_NUMBERS, MOST_MESSAGES = 100, 10


@dataclass
class Seen:
    """How many batches had some property, and the numbers of the first ones."""

    count: int = 0
    batches: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.batches) < MOST_NUMBERS:
            self.batches.append(number)

    def __str__(self) -> str:
        more = f" and {self.count - len(self.batches)} more" if self.count > len(self.batches) else ""
        return f"{', '.join(map(str, self.batches))}{more}"


@dataclass
class DataReport:
    """What was noticed so far, by this process or, when merged, by all processes.

    batches: how many were looked at. raised: batches that could not be loaded, transformed, matched or run; `messages`
    says why for the first ones. nonfinite: batches in which an input has NaN or Inf. constant: for each input, batches
    in which all its elements are equal. lows, highs: for each input, the extremes over all batches.
    """

    batches: int = 0
    raised: Seen = field(default_factory=Seen)
    messages: dict[str, str] = field(default_factory=dict)
    nonfinite: Seen = field(default_factory=Seen)
    constant: dict[str, Seen] = field(default_factory=dict)
    lows: dict[str, float] = field(default_factory=dict)
    highs: dict[str, float] = field(default_factory=dict)

    def look(self, number: int, signature: Signature, flat: Iterable[Any]) -> list[str]:
        """Look at the inputs of a batch. Returns the names of inputs that have NaN or Inf."""
        found = [
            leaf.name
            for leaf, value in zip(signature.leaves, flat, strict=True)
            if isinstance(value, torch.Tensor) and value.numel() and not value.is_complex()
            and not self._look_at(leaf.name, number, value)
        ]  # fmt: skip
        self.batches += 1
        if found:
            self.nonfinite.add(number)
        return found

    def _look_at(self, name: str, number: int, value: torch.Tensor) -> bool:
        low, high = _extremes(value.detach())
        if low == high and value.numel() > 1:
            self.constant.setdefault(name, Seen()).add(number)
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.lows[name] = min(low, self.lows.get(name, low))
        self.highs[name] = max(high, self.highs.get(name, high))
        return True

    def note_raised(self, number: int, message: str, looked_at: bool) -> None:
        """Batch `number` raised; `looked_at` says whether it was counted by `look` already."""
        self.batches += not looked_at
        self.raised.add(number)
        if len(self.messages) < MOST_MESSAGES:
            # Errors of `calib` begin with the batch's number. Remove it, since `lines` and `check_share` add it.
            self.messages[str(number)] = re.sub(rf"^batch {number}( is |[:,] )", _rest, message)

    @property
    def constant_inputs(self) -> dict[str, float]:
        """Inputs whose elements all had the same value in all batches, with that value."""
        return {name: low for name, low in self.lows.items() if low == self.highs[name]}

    def bad_share(self, total: int | None = None) -> float:
        """The share of batches that raised, among `total` or, without it, among those looked at."""
        return self.raised.count / max(total or self.batches, 1)

    def to_json(self) -> dict[str, Any]:
        """For a manifest or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DataReport:
        """What `to_json` gave."""
        seen = {name: Seen(**fields[name]) for name in ("raised", "nonfinite")}
        return cls(**{**fields, **seen, "constant": {name: Seen(**row) for name, row in fields["constant"].items()}})

    @classmethod
    def merged(cls, reports: Iterable[DataReport]) -> DataReport:
        """One report from those of several processes, in the order of the batches."""
        total = cls()
        for report in reports:
            total.batches += report.batches
            total.messages |= report.messages
            for mine, theirs in ((total.raised, report.raised), (total.nonfinite, report.nonfinite)):
                _add(mine, theirs)
            for name, theirs in report.constant.items():
                _add(total.constant.setdefault(name, Seen()), theirs)
            for name, low in report.lows.items():
                total.lows[name] = min(low, total.lows.get(name, low))
                total.highs[name] = max(report.highs[name], total.highs.get(name, report.highs[name]))
        first = sorted(total.messages.items(), key=lambda item: int(item[0]))[:MOST_MESSAGES]
        total.messages = dict(first)
        return total

    def lines(self) -> list[str]:
        """What the user should know; empty when there is nothing."""
        found = []
        if self.raised.count:
            first = "; ".join(f"batch {number}: {message}" for number, message in list(self.messages.items())[:3])
            found.append(
                f"{self.raised.count} of {self.batches} batches raised and were left out ({self.raised}): {first}"
            )
        if self.nonfinite.count:
            found.append(f"{self.nonfinite.count} of {self.batches} batches have NaN or Inf inputs: {self.nonfinite}")
        for name, value in self.constant_inputs.items():
            found.append(f"input {name} is {value:g} everywhere: is it fed what it should be?")
        for name, seen in self.constant.items():
            if name not in self.constant_inputs:
                found.append(f"input {name} is constant within {seen.count} of {self.batches} batches: {seen}")
        return found


def check_share(report: DataReport, limits: Limits, every: int | None = None) -> None:
    """Raise GateError when a larger share of the batches raised than the limit allows. every: how many batches there
    are; None: those looked at so far."""
    share = report.bad_share(every)
    if share > limits.max_bad_share:
        first = "; ".join(f"batch {number}: {message}" for number, message in list(report.messages.items())[:3])
        raise GateError(
            f"the gate says no: {report.raised.count} of {every or report.batches} batches raised "
            f"({100 * share:.3g}%), more than limits.max_bad_share = {100 * limits.max_bad_share:.3g}%. {first}"
        )


def refuse_nonfinite(batch: str, inputs: Iterable[str]) -> None:
    """Raise the GateError of `limits.on_nonfinite_inputs = "stop"`. batch: the batch's name in the message."""
    raise GateError(
        f"the gate says no: {batch} has NaN or Inf in {', '.join(inputs)}, and limits.on_nonfinite_inputs is "
        '"stop". Mend the data, or set it to "skip" to leave such batches out.'
    )


def _extremes(value: torch.Tensor) -> tuple[float, float]:
    """The least and the largest element. torch cannot compare types such as uint16 and float8, so they are widened,
    which is exact."""
    if value.dtype.itemsize <= 4 and not value.dtype.is_signed and value.dtype not in (torch.uint8, torch.bool):
        value = value.to(torch.int64)
    elif value.dtype.is_floating_point and value.dtype.itemsize == 1:
        value = value.float()
    elif value.dtype == torch.uint64:
        value = value.double()
    low, high = torch.aminmax(value)
    return float(low), float(high)


def _rest(named: re.Match[str]) -> str:
    return "it is " if named[1] == " is " else ""


def _add(mine: Seen, theirs: Seen) -> None:
    mine.count += theirs.count
    mine.batches = sorted([*mine.batches, *theirs.batches])[:MOST_NUMBERS]
