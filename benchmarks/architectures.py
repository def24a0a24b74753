"""Every architecture of the zoo: how much is low, how far it moved, and whether TensorRT-RTX takes it.

    python benchmarks/architectures.py -o benchmarks/results/architectures.md
    python benchmarks/architectures.py --only bert --only resnet --types fp16
    python benchmarks/architectures.py --plans-only

One row per model and type: the plan of the rules, that for the default budget with evidence of rounding, the same graph
with everything low ("half"), Torch-TensorRT's own autocast where it is installed, and whether TensorRT-RTX builds the
fp32 and the cast graph into one network; `--plans-only` leaves out the last two. Calibration, s: by the clock, for all
batches. Everything runs in a child process, so that a crash costs one cell. Needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.isolation import Worker
from benchmarks.zoo import ZOO
from benchmarks.zoo.coverage import coverage_table

WORKER = [sys.executable, "-m", "benchmarks.zoo.worker"]
HEADINGS = (
    "model", "type", "rules: nodes", "work", "bytes", "casts", "error", "half error", "misses", "calibration, s",
    "budget: nodes", "work", "bytes", "casts", "error", "SQNR, dB", "predicted, dB", "misses", "calibration, s",
    "peer: nodes", "work", "bytes", "casts", "error", "RTX builds fp32", "RTX builds cast",
)  # fmt: skip
Row = dict[str, Any]


def measured(worker: Worker, model: str, kind: str, fp32_builds: str | None) -> Row:
    """All that a row says of a model in one type. fp32_builds: None where neither peer nor builder is asked."""

    def ask(what: str) -> dict[str, Any]:
        return worker.ask({"ask": what, "model": model, "type": kind})

    row = {
        "model": model,
        "type": kind,
        "ours": ask("ours"),
        "budget": ask("budget"),
        "fp32": fp32_builds or "not asked",
    }
    if fp32_builds is not None and has_torch_tensorrt():
        row["peer"] = ask("peer")
        row["cast"] = built(worker, model, kind)
    return row


def built(worker: Worker, model: str, kind: str) -> str:
    """`yes`, with which settings, or why not: a cast graph with those that `engines.build` takes from its plan."""
    first = worker.ask({"ask": "build" if kind == "fp32" else "build_cast", "model": model, "type": kind})
    if "result" in first:
        settings = first["result"].get("settings")
        return f"yes, with {', '.join(settings)}" if settings else "yes"
    second = worker.ask({"ask": "build_decomposed", "model": model, "type": kind})
    if "result" in second:
        return f"with decompose_attention ({_short(first['failure'])} without)"
    return str(first["failure"])


def has_torch_tensorrt() -> bool:
    """Whether the peer and the builder are installed."""
    try:
        metadata.version("torch-tensorrt-rtx")
    except metadata.PackageNotFoundError:
        return False
    return True


def table(rows: Iterable[Row]) -> str:
    """Markdown, a line per row."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def cells(row: Row) -> list[str]:
    """The cells of a row, in the order of `HEADINGS`."""
    start = [row["model"], row["type"]]
    found = [
        *start,
        *_ours(row["ours"]),
        *_budget(row["budget"]),
        *_peer(row.get("peer")),
        row["fp32"],
        row.get("cast", "not asked"),
    ]
    return [cell.replace("|", "\\|") for cell in found]


def _ours(answer: dict[str, Any]) -> list[str]:
    found = answer.get("result")
    if found is None:
        return [answer["failure"], "", "", "", "", "", "**misses**", ""]
    return [
        *_shares(found["shares"]), _error(found["error"]), _error(found["half_error"]), _misses(found),
        f"{found['seconds']:.1f}",
    ]  # fmt: skip


def _budget(answer: dict[str, Any]) -> list[str]:
    found = answer.get("result")
    if found is None:
        return [answer["failure"], "", "", "", "", "", "", "**misses**", ""]
    predicted = "none" if found["predicted_db"] is None else f"{found['predicted_db']:.1f}"
    spread = ", spread" if found["spread"] else ""
    seen = f"{-20 * math.log10(found['error']):.1f}" if found["error"] else "inf"
    return [
        *_shares(found["shares"]), _error(found["error"]), seen, f"{predicted}{spread}", _misses(found),
        f"{found['seconds']:.1f}",
    ]  # fmt: skip


def _misses(found: dict[str, Any]) -> str:
    return f"**{'; '.join(found['misses'])}**" if found["misses"] else ""


def _peer(answer: dict[str, Any] | None) -> list[str]:
    if answer is None:
        return ["not installed", "", "", "", ""]
    found = answer.get("result")
    if found is None:
        return [answer["failure"].replace("PeerError: ", ""), "", "", "", ""]
    notes = ([] if found["right"] else ["wrong"]) + ([] if found["types_kept"] else ["output types change"])
    return [*_shares(found["shares"]), f"{_error(found['error'])}{' (' + ', '.join(notes) + ')' if notes else ''}"]


def _shares(shares: dict[str, float]) -> list[str]:
    return [*(_percent(shares[name]) for name in ("nodes", "work", "bytes")), str(shares["casts"])]


def _percent(share: float) -> str:
    return "none" if share != share else f"{100 * share:.0f}%"


def _error(value: float) -> str:
    return f"{value:.2e}"


def _short(failure: str) -> str:
    return failure.split(":", 1)[0]


def summary(rows: list[Row]) -> str:
    """Counts over all rows."""
    lines = []
    for kind in dict.fromkeys(row["type"] for row in rows):
        mine = [row for row in rows if row["type"] == kind]
        ran = [row["ours"]["result"] for row in mine if "result" in row["ours"]]
        good = sum(not found["misses"] for found in ran)
        lines.append(f"- {kind}: of {len(mine)} models, {len(ran)} are cast and run, {good} without a miss.")
        planned = [row["budget"]["result"] for row in mine if "result" in row["budget"]]
        met = sum(not found["misses"] for found in planned)
        lines.append(f"- {kind}, for the budget: {len(planned)} are cast and run, {met} without a miss.")
        theirs = [row["peer"] for row in mine if "peer" in row]
        if theirs:
            done = [answer["result"] for answer in theirs if "result" in answer]
            right = sum(found["right"] for found in done)
            kept = sum(found["right"] and found["types_kept"] for found in done)
            lines.append(
                f"- {kind}, Torch-TensorRT's own autocast: {len(done)} are cast and run, {right} are right, {kept} "
                "of these keep the types of their outputs."
            )
            takes = [row for row in mine if row["fp32"] == "yes"]
            taken = sum(row["cast"].startswith("yes") for row in takes)
            lines.append(f"- {kind}: TensorRT-RTX builds {len(takes)} of the fp32 graphs, and {taken} of their casts.")
    return "\n".join(lines)


def high_nodes(rows: Iterable[Row]) -> str:
    """Which nodes stay high, with rule and numbers: of every row where any does."""
    parts = []
    for row in rows:
        found = row["ours"].get("result")
        if found is None or not found["high"]:
            continue
        lines = [f"- `{node}` ({rule}): {reason}" for node, rule, reason, _, _ in found["high"]]
        more = found["high_count"] - len(found["high"])
        lines += [f"- and {more} more"] if more else []
        parts.append("\n".join([f"### {row['model']}, {row['type']}", "", *lines]))
    return "\n\n".join(parts)


def page(rows: list[Row]) -> str:
    """All that is written of these rows."""
    covered = coverage_table(ZOO[name] for name in dict.fromkeys(row["model"] for row in rows))
    parts = [
        "# Architectures", machine.header(), summary(rows), table(rows), "## What stays high by the rules, and why",
        high_nodes(rows), "## What the zoo covers", covered,
    ]  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(ZOO), metavar="NAME", help="a model; may be repeated")
    parser.add_argument("--types", default="fp16,bf16", help="low types, separated by commas")
    parser.add_argument("--plans-only", action="store_true", help="ask neither the peer nor the builder")
    parser.add_argument("-o", "--output", help="Markdown file to write")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with Worker(WORKER) as worker:
        for model in arguments.only or ZOO:
            asked = has_torch_tensorrt() and not arguments.plans_only
            fp32 = built(worker, model, "fp32") if asked else None
            for kind in arguments.types.split(","):
                rows.append(measured(worker, model, kind, fp32))
                print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
            if arguments.output:  # what there is, should it be stopped
                Path(arguments.output).write_text(page(rows) + "\n", encoding="utf-8")
    machine.write(arguments.output, page(rows))


if __name__ == "__main__":
    main()
