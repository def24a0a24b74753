"""Latency and error of networks in every precision a user could pick, interleaved, on a GPU.

    python benchmarks/precision_latency.py --output benchmarks/results/precision_latency.md
    python benchmarks/precision_latency.py --networks resnet50 bert_base --variants "eager fp32" "calibcast fp16" ...

One process a network. Its variants take turns within a round, so that a clock that drifts is nobody's gain. Whatever is
done is written at once beside the output, as JSON lines: a run that is killed keeps its rows, and a variant at which
the process dies is a row that says so, after which the others are run without it.

Errors are against eager fp32 with TF32 off, over batches that no calibration saw. TensorRT runs what is fp32 in TF32,
as it does unless told otherwise. "build s" is what the variant takes to be ready, its calibration not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.precision_variants import INDUCTOR, VARIANTS

NETWORKS = (
    "resnet50", "vit_b_16", "bert_base", "minilm", "nafnet", "lstm_tagger", "overflows", "underflows", "digits",
    "characters", "radiance_field", "massive_channels", "diffusion",
)  # fmt: skip
_HEADER = (
    "| variant | ms median (min to max) | rel. L2 | SQNR dB | NaN or Inf | build s | layers in half | notes |",
    "|---|---|---|---|---|---|---|---|",
)


def run_network(name: str, options: argparse.Namespace, rows: Path, deadline: float) -> None:
    """Run one network in processes of their own until every variant has its row or the time is up."""
    skipped: list[str] = []
    while True:
        left = min(deadline - time.monotonic(), options.per_network)
        if left < 20:
            _append(rows, {"network": name, "variant": "", "note": "not run: the time was up"})
            return
        command = [sys.executable, __file__, "--child", name, "--rows", str(rows), "--device", options.device]
        command += ["--rounds", str(options.rounds), "--variants", *[v for v in options.variants if v not in skipped]]
        said = rows.with_suffix(".stderr")
        with said.open("w", encoding="utf-8") as stderr:
            child = subprocess.Popen(command, start_new_session=True, stderr=stderr)
        try:
            code = child.wait(timeout=left)
            ended = "" if code == 0 else f"{_ending(code)}: {_last_line(said)}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            ended = f"ran past {left:.0f} s"
        culprit = _unfinished(rows, name)
        if not ended:
            return
        _append(rows, {"network": name, "variant": culprit, "note": f"the process {ended}"})
        if not culprit or culprit in skipped or ended.startswith("ran past"):
            return
        skipped.append(culprit)


def _last_line(said: Path) -> str:
    """What a process said last on stderr: the error's own line of a traceback."""
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join(lines[-40:]), file=sys.stderr)
    return lines[-1][:200] if lines else "nothing was said"


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _unfinished(rows: Path, name: str) -> str:
    """The variant that was being worked on when the process ended."""
    lines = [line for line in _read(rows) if line["network"] == name]
    return str(lines[-1].get("doing", "")) if lines else ""


def _append(rows: Path, row: dict[str, Any]) -> None:
    with rows.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for each network; of a variant that ran twice, the last."""
    parts = []
    for name in dict.fromkeys(row["network"] for row in rows):
        found = {row["variant"]: row for row in rows if row["network"] == name and "doing" not in row}
        order = [variant for variant in (*VARIANTS, *INDUCTOR, "") if variant in found]
        title = next((row["title"] for row in rows if row["network"] == name and "title" in row), name)
        parts += [f"\n## {title}\n", *_HEADER, *(_line(found[variant]) for variant in order)]
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    def cell(key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else format(float(value), form)

    time_ = "" if row.get("ms") is None else f"{row['ms']:.3f} ({row['ms_min']:.3f} to {row['ms_max']:.3f})"
    share = row.get("half_share")
    cells = [
        row["variant"] or "(all)", time_, cell("rel_l2", ".2e"), cell("sqnr_db", ".1f"), cell("nonfinite", ".0f"),
        cell("build_seconds", ".1f"), "" if share is None or math.isnan(share) else f"{100 * share:.0f}%",
        str(row.get("note", "")).replace("|", "/").replace("\n", " ")[:240],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write(options: argparse.Namespace, rows: Path) -> None:
    """The Markdown of what there is so far."""
    text = [
        "# Precision and latency on a GPU\n",
        machine.header(),
        f"{options.rounds} interleaved rounds; medians with the range. Errors against eager fp32 (TF32 off), on "
        "held-out data; TensorRT may use TF32 for what is fp32.",
        markdown(_read(rows)),
    ]
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/precision_latency.md")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), choices=[*VARIANTS, *INDUCTOR], metavar="VARIANT"
    )
    parser.add_argument("--inductor", action="store_true", help="also fp32, whole-half and the plan by AOTInductor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=570.0, help="of this whole command")
    parser.add_argument("--per-network", type=float, default=240.0, help="seconds after which a network is given up")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keep", action="store_true", help="add to the rows of an earlier run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variants += [variant for variant in INDUCTOR if options.inductor and variant not in options.variants]
    if options.child:
        from benchmarks.precision_variants import measure

        measure(options.child, options.variants, options.device, options.rounds, Path(options.rows))
        return
    rows = Path(options.output).with_suffix(".jsonl")
    rows.parent.mkdir(parents=True, exist_ok=True)
    if not options.keep:
        rows.unlink(missing_ok=True)
    deadline = time.monotonic() + options.seconds
    with contextlib.suppress(KeyboardInterrupt):
        for name in options.networks:
            run_network(name, options, rows, deadline)
            write(options, rows)
    print(Path(options.output).read_text())


if __name__ == "__main__":
    main()
