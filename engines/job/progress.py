"""The progress of a stage: a bar on a terminal, else a line in the log from time to time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from calibcast.engines.job.logs import tell
from tqdm import tqdm

_EVERY_SECONDS = 10.0


class Progress:
    """Counts the batches of a stage, and shows rate, time left and memory.

    start: batches that the resumed run had finished. bar: show a progress bar where stderr is a terminal; False for
    JSON lines.
    """

    def __init__(self, stage: str, total: int | None, start: int = 0, bar: bool = True, quiet: bool = False) -> None:
        self._stage, self._total, self._start, self._quiet = stage, total, start, quiet
        self._count, self._began, self._told = start, time.monotonic(), time.monotonic()
        shown = bar and not quiet and sys.stderr.isatty()
        self._bar = tqdm(desc=stage, total=total, initial=start, unit="batch", file=sys.stderr) if shown else None

    def advance(self) -> None:
        """One batch is finished."""
        self._count += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
            if now - self._told >= 1.0:
                self._bar.set_postfix_str(f"{memory_mb():.0f} MB")
                self._told = now
        elif not self._quiet and now - self._told >= _EVERY_SECONDS:
            self._tell(now)

    def close(self) -> None:
        """End the progress of a stage that is over or was stopped: remove the bar, or log the last position."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{memory_mb():.0f} MB")
            self._bar.close()
        elif not self._quiet:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        done, seconds = self._count - self._start, now - self._began
        rate = done / seconds if seconds > 0 else 0.0
        left = None if self._total is None or rate == 0 else max(self._total - self._count, 0) / rate
        of = "" if self._total is None else f"/{self._total}"
        rest = "" if left is None else f", {left:.0f} s left"
        memory = memory_mb()
        tell(
            f"{self._stage}: {self._count}{of} batches, {rate:.1f}/s{rest}, {memory:.0f} MB",
            event="progress", stage=self._stage, batches=self._count, total=self._total, per_second=round(rate, 3),
            seconds_left=None if left is None else round(left, 1), memory_mb=round(memory, 1),
        )  # fmt: skip
        self._told = now


def memory_mb() -> float:
    """Resident memory of this process plus what it has allocated on a GPU, MB."""
    device = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return resident_mb() + device


def resident_mb() -> float:
    """Resident memory of this process, MB: the current value, or the peak where the system does not tell the current
    one."""
    status = Path("/proc/self/statm")
    if status.exists():
        import resource

        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20
