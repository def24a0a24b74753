"""`engine.monitor`: watches one of every N calls of an engine."""

from __future__ import annotations

import logging
import operator
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from calibcast.calib.aliasing import mutated_inputs
from calibcast.calib.artifacts import versions
from calibcast.calib.batches import signature_of
from calibcast.calib.errors import SettingError
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.calib.range_schema import Calibration
from calibcast.calib.ranges import RangeTable
from calibcast.engines.monitoring.ends import ends_of
from calibcast.engines.monitoring.findings import Finding, findings_of
from calibcast.engines.monitoring.report import MonitorReport, report_of
from calibcast.engines.monitoring.tally import Tally
from calibcast.engines.runtimes import Runtime
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_log = logging.getLogger("calibcast")
# One of every N calls is watched: first call 0, then one at a scattered place, so that it is not always the same step
# of a loop. 2^32 by the golden ratio spreads consecutive numbers evenly (Knuth, TAOCP volume 3, section 6.4).
_STRIDE = 0x9E3779B1


class Watched(Protocol):
    """What a monitor has to know about an `Engine`."""

    @property
    def program(self) -> ExportedProgram: ...

    @property
    def ranges(self) -> RangeTable | None: ...

    @property
    def device(self) -> torch.device: ...

    def unwatch(self, monitor: Monitor) -> None: ...


class Monitor:
    """Watches an engine's calls; made by `Engine.monitor`. A context manager: it stops watching at its end.

    Calls from several threads may be watched. On a GPU a watched call gives the device a little more work, and no call
    waits for it: the results are read in a later call, once they have arrived. Only `report`, `ranges` and `save` wait.
    """

    def __init__(self, engine: Watched, every: int, tolerance: float) -> None:
        if every < 1:
            raise SettingError(f"every={every}: give 1 to watch every call, or 1000 to watch one of 1000")
        if not tolerance >= 0:
            raise SettingError(f"tolerance={tolerance}: a share of the calibrated peak, at least 0")
        self._engine, self._tolerance, self._every = engine, tolerance, every
        self._ends = ends_of(engine.program, engine.ranges)
        self._signature = signature_of(engine.program)
        self._written = _written_places(engine.program)
        self._tally = Tally(self._ends, engine.device)
        self._lock = threading.Lock()
        # next() of an iterator over a range is one step of the interpreter: threads take different numbers without a
        # lock. How many are left is how many calls there were, and asking takes no number.
        self._numbers = iter(range(sys.maxsize))
        self._waiting = False
        self._findings: dict[tuple[str, str], Finding] = {}

    def run(self, runtime: Runtime, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call of the engine, watched when it is its turn."""
        number = next(self._numbers)
        turn, place = divmod(number, self._every)
        if place != (turn * _STRIDE >> 8 & 0xFFFFFF) % self._every or self._captured():
            if self._waiting:
                self._look(number)
            return runtime(*args, **kwargs)
        before = self._inputs_before(args, kwargs)
        result = runtime(*args, **kwargs)
        self._watch(number, before, args, kwargs, result)
        return result

    def _captured(self) -> bool:
        """Whether a CUDA graph is being captured. Each replay would repeat a measurement that was captured."""
        return self._engine.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _inputs_before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The inputs as they are before a call that writes to them; None for one that does not."""
        if not self._written:
            return None
        flat = self._signature.flatten_call(args, kwargs)
        return [
            v.detach().clone() if i in self._written and isinstance(v, torch.Tensor) else v for i, v in enumerate(flat)
        ]

    def _watch(self, number: int, before: list[Any] | None, args: Any, kwargs: Any, result: Any) -> None:
        try:
            inputs = self._signature.flatten_call(args, kwargs) if before is None else before
            outputs = pytree.tree_leaves(result)
            with self._lock:
                self._tally.add(inputs, outputs)
                if not self._waiting:
                    self._tally.ask()
                    self._waiting = True
        except Exception as error:  # a service goes on without its monitor
            _log.warning("the monitor stops watching: %s: %s", type(error).__name__, error)
            self.stop()
            return
        self._look(number)

    def _look(self, number: int) -> None:
        """Warn of new findings, if the numbers that were asked for have arrived."""
        with self._lock:
            if not self._waiting or not self._tally.ready():
                return
            self._waiting = False
            new = self._new_findings(number)
        for finding in new:
            warnings.warn(f"engine in service: {finding}", stacklevel=5)

    def _new_findings(self, number: int) -> list[Finding]:
        found = findings_of(self._ends, self._tally.seen(), self._tally.watched, self._tolerance, number)
        new = [finding for finding in found if (finding.cause, finding.name) not in self._findings]
        self._findings |= {(finding.cause, finding.name): finding for finding in new}
        return new

    @property
    def calls(self) -> int:
        """How many calls the engine has had since the monitor began."""
        return sys.maxsize - operator.length_hint(self._numbers)

    @property
    def watched(self) -> int:
        """How many of these calls were watched."""
        return self._tally.watched

    def report(self) -> MonitorReport:
        """What was seen so far, beside the calibration. Waits for the device."""
        calls = self.calls
        with self._lock:
            self._tally.ask()
            statistics = self._tally.statistics()
            self._waiting = False
            self._new_findings(calls - 1)
            findings = tuple(self._findings.values())
        return report_of(self._ends, statistics, findings, calls, self._tally.watched)

    @property
    def ranges(self) -> RangeTable:
        """The range table of the watched calls: the rows of inputs and outputs, under the calibration's names.

        `calibcast diff` compares it with the calibration's. Waits for the device.
        """
        with self._lock:
            return self._tally.table(self._calibration())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `ranges` as Parquet, for `calibcast diff`. Raises ArtifactError when it cannot be written."""
        self.ranges.save(path)

    def _calibration(self) -> Calibration:
        """The program that the table names: the calibrated network where it is known, else the engine's own program."""
        table, program = self._engine.ranges, self._engine.program
        if table is not None:
            of = table.true_values().calibration
            digests, weights = of.digests, of.weights
        else:
            digests, weights = node_digests(program), weights_hash(program)
        sizes = {name: [dict(counts) for counts in dimensions] for name, dimensions in self._tally.sizes.items()}
        made = Calibration(digests, weights, self._tally.watched, input_sizes=sizes, versions=versions())
        return replace(made, ends_only=True)

    def stop(self) -> None:
        """Stop watching the engine. `report`, `ranges` and `save` still tell what was seen."""
        self._engine.unwatch(self)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _written_places(program: ExportedProgram) -> frozenset[int]:
    """Which flat user inputs the program writes to."""
    written, names = mutated_inputs(program), program.graph_signature.user_inputs
    return frozenset(place for place, name in enumerate(names) if isinstance(name, str) and name in written)
