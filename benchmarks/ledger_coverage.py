"""How much of a plan can be found again in an engine: the ledger's shares, on engines built without a GPU.

    python benchmarks/ledger_coverage.py --output benchmarks/results/ledger_coverage.md

Small batches: what a ledger finds does not depend on sizes. Each engine is built by TensorRT-RTX in its own process.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib import calibrate
from calibcast.calib.errors import CalibcastError
from calibcast.engines import build
from calibcast.engines.ledger.ledger_text import contradictions, unknown_share
from calibcast.passes import classify, insert_casts

from benchmarks import engine_networks as networks
from benchmarks import machine

SUBJECTS: dict[str, Callable[[], networks.Subject]] = {
    "resnet50": lambda: networks.resnet50("cpu", batch=2),
    "vit_b_16": lambda: networks.vit("cpu", batch=1),
    "bert, 2 layers": lambda: networks.bert("cpu", batch=1, layers=2),
    "minilm": lambda: networks.minilm("cpu", batch=2),
    "nafnet": lambda: networks.nafnet("cpu", batch=1, size=64),
    "lstm_tagger": lambda: networks.tagger("cpu", batch=2, length=8),
    "overflows": lambda: networks.overflowing("cpu", batch=2),
    "underflows": lambda: networks.underflowing("cpu", batch=2),
}


def row(name: str, low_type: torch.dtype) -> str:
    """One Markdown row."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    with torch.no_grad():
        program = torch.export.export(subject.model, subject.held_out[0])
    ranges = calibrate(program, subject.calibration, progress=False)
    plan = classify(program, ranges, low_precision_type=low_type)
    try:
        engine = build(
            insert_casts(program, plan), plan, ranges, backend="tensorrt", ahead_of_time=True, cache=False,
            progress=False, on_failure="fallback",
        )  # fmt: skip
    except CalibcastError as error:
        return f"| {name} | {low_type} | fails: {str(error)[:160]} | | | | | | |"
    ledger, record = engine.ledger, engine.record
    matches, ways = Counter(ledger["match"].to_list()), Counter(ledger["found_by"].drop_nulls().to_list())
    found = ", ".join(f"{way} {count}" for way, count in ways.most_common())
    wrong = contradictions(ledger)
    named = ", ".join(f"{op.split('.')[1]} x{n}" for op, n in Counter(wrong["op"].to_list()).most_common(3))
    note = "; ".join([*record["remedies"], record["set_by_plan"]]).strip("; ")
    cells = [
        name,
        str(low_type).removeprefix("torch."),
        str(ledger.height),
        " / ".join(str(matches[kind]) for kind in ("exact", "fused", "unknown")),
        f"{100 * unknown_share(ledger):.1f}%",
        f"{wrong.height} {named}",
        found,
        f"{record['half_layers']} of {record['typed_layers']}",
        note,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="write the Markdown there, too")
    parser.add_argument("--networks", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--types", nargs="*", default=["float16", "bfloat16"])
    options = parser.parse_args()
    lines = [
        "# What the ledger finds, engines built without a GPU\n",
        machine.header(),
        "| network | type | planned nodes | exact / fused / unknown | unknown | contradict | found by | "
        "layers in half | remedies, settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in options.networks:
        for low_type in options.types:
            lines.append(row(name, getattr(torch, low_type)))
            machine.write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
