"""What a plan does to a trained network: its size, its SQNR on two kinds of data, and the task's own number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.output_noise import channel_noise
from calibcast.passes.cast_count import CastCounter
from calibcast.passes.emulation import emulated
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram

from benchmarks.trained.subject import Batch, Subject


@dataclass(frozen=True)
class Noise:
    """Signal to noise, dB. pooled: of the worst output, over all batches. worst: of a channel, in the worst batch."""

    pooled: float = math.nan
    worst: float = math.nan

    def __str__(self) -> str:
        return f"{self.pooled:.1f}, {self.worst:.1f}"


@dataclass(frozen=True)
class Judged:
    """One plan of one network in one type; or why there is none.

    bytes_high: of activations in fp32, in the exported sizes. equal_bytes: those of a plan that is tuned for no more
    than the SQNR that today's rules have, where that was asked. metric_fp32: of the network as it is.
    """

    network: str
    type_name: str
    plan: str
    high: int = 0
    work_low: float = math.nan
    bytes_low: float = math.nan
    bytes_high: int = 0
    casts: int = 0
    calibration: Noise = Noise()
    held_out: Noise = Noise()
    metric_name: str = ""
    metric_fp32: float = math.nan
    metric: float = math.nan
    seconds: float = math.nan
    refused: str = ""
    equal_bytes: int | None = None

    @classmethod
    def loaded(cls, row: Mapping[str, Any]) -> Judged:
        """From what `asdict` gave."""
        return cls(**{**row, "calibration": Noise(**row["calibration"]), "held_out": Noise(**row["held_out"])})

    def line(self) -> str:
        """As a row of Markdown."""
        if self.refused:
            cells = [f"refused: {self.refused}", *[""] * 6]
        else:
            cells = [
                str(self.high), f"{self.work_low:.1%}", f"{self.bytes_low:.1%}", str(self.casts), str(self.calibration),
                str(self.held_out), f"{self.metric_name}: {self.metric_fp32:.4g} -> {self.metric:.4g}",
            ]  # fmt: skip
        return f"| {' | '.join([self.network, self.type_name, self.plan, *cells, f'{self.seconds:.1f}'])} |"


@dataclass(frozen=True)
class Judge:
    """A subject's program, its own results, and the counter of its casts."""

    subject: Subject
    program: ExportedProgram
    counter: CastCounter
    metric: float
    expected: dict[int, list[torch.Tensor]] = field(repr=False)  # by id of the batch
    seen: dict[tuple[str, tuple[str, ...]], Judged] = field(default_factory=dict, repr=False)  # by type and low nodes

    @classmethod
    def of(cls, subject: Subject) -> Judge:
        """Exports it, and runs it on all its data."""
        with torch.no_grad():
            program = torch.export.export(subject.model, subject.calibration[0])
        runner = ProgramRunner(program)
        expected = {id(batch): _run(runner, batch) for batch in (*subject.calibration, *subject.held_out)}
        metric = subject.metric(lambda *inputs: _run(runner, inputs))
        return cls(subject, program, CastCounter(program), metric, expected)

    def judged(self, network: str, type_name: str, kind: str, plan: PrecisionPlan) -> Judged:
        """All that a row says of a plan. A plan that is as another one is not run again."""
        key = type_name, plan.low_precision_nodes
        if key not in self.seen:
            self.seen[key] = self._judged(network, type_name, kind, plan)
        return replace(self.seen[key], plan=kind)

    def _judged(self, network: str, type_name: str, kind: str, plan: PrecisionPlan) -> Judged:
        counted = self.counter.count(plan.low_precision_nodes, plan.low_precision_type)
        work = {row.node: row.work for row in plan.decisions if row.precision != "kept"}
        low, whole = sum(work[name] for name in plan.low_precision_nodes), sum(work.values())
        runner = emulated(self.program, plan)
        return Judged(
            network, type_name, kind,
            high=len(plan.high_precision_nodes),
            work_low=low / whole if whole else 0.0,
            bytes_low=counted.activation_bytes_low / max(1, self.counter.activation_bytes),
            bytes_high=self.counter.activation_bytes - counted.activation_bytes_low,
            casts=counted.casts,
            calibration=self._noise(runner, self.subject.calibration),
            held_out=self._noise(runner, self.subject.held_out),
            metric_name=self.subject.metric_name,
            metric_fp32=self.metric,
            metric=self.subject.metric(lambda *inputs: _run(runner, inputs)),
        )  # fmt: skip

    def _noise(self, runner: ProgramRunner, batches: Sequence[Batch]) -> Noise:
        noise: dict[int, float] = {}
        power: dict[int, float] = {}
        worst = 0.0
        for batch in batches:
            for output, (ours, theirs) in enumerate(zip(_run(runner, batch), self.expected[id(batch)], strict=True)):
                if not theirs.is_floating_point():
                    continue
                worst = max(worst, float(channel_noise(ours, theirs).max()))
                error = (ours - theirs).double().square().sum()
                noise[output] = noise.get(output, 0.0) + float(error.nan_to_num(math.inf))
                power[output] = power.get(output, 0.0) + float(theirs.double().square().sum())
        return Noise(_decibels(max(noise[o] / power[o] for o in noise)), _decibels(worst))


def _run(runner: ProgramRunner, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.clone() for t in runner.run([t.clone() for t in inputs]) if isinstance(t, torch.Tensor)]


def _decibels(noise: float) -> float:
    return math.inf if noise <= 0 else -math.inf if math.isinf(noise) else -10 * math.log10(noise)
