"""What a sweep finds out about one edge in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from calibcast.calib.rounding_edges import Edge


@dataclass
class Found:
    """What rounding at one edge did in one batch. noise: by column. local: noise to signal at the reader's results."""

    noise: list[float]
    nonfinite: int = 0
    steps: int = 0
    local: float = 0.0
    ran: bool = False

    def clear(self) -> None:
        """Forget what was found, for another batch."""
        self.noise = [0.0] * len(self.noise)
        self.nonfinite, self.steps, self.local, self.ran = 0, 0, 0.0, False


Findings = dict[tuple[Edge, torch.dtype], Found | str]  # a string says why there is nothing
