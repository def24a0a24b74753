"""How long a reviewer waits: report, filter, diff and page of a large table, and `what_if` on a large program.

    python benchmarks/review_speed.py --output benchmarks/results/review_speed.md

Targets: 10,000 tensors report, filter and diff in under 2 s; `what_if` asks 5,000 nodes for several settings in under
1 s; a page of 3,000 tensors weighs less than 6 MB and can be used after less than 3 s. The large tables are the
measured one of a deep transformer, repeated under other names. Median of five runs after one that is not counted; of
the commands as a whole, Python and torch start too. The page is timed in headless Chromium, where there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast.calib import RangeTable, calibrate
from calibcast.calib.range_diff import range_diff
from calibcast.engines.html_report import html_report
from calibcast.engines.review.diff_text import diff_text
from calibcast.engines.review.report_table import report_frame, report_table
from calibcast.passes import classify, what_if
from calibcast.passes.tensor_diff import tensor_decision_diff

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent
LAYERS, WIDTH, HEADS, RUNS = 263, 16, 4, 5


class Block(nn.Module):
    """A transformer block, small enough that 263 of them export in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, words, 16]."""
        batch, words, _ = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, words, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, words, WIDTH)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norms[1](x))) * 1.5)


def measured() -> tuple[ExportedProgram, RangeTable]:
    """A program of 5,000 nodes, and its ranges."""
    torch.manual_seed(0)
    data = [torch.randn(2, 8, WIDTH) for _ in range(2)]
    program = torch.export.export(nn.Sequential(*(Block() for _ in range(LAYERS))).eval(), (data[0],))
    return program, calibrate(program, data, progress=False)


def repeated(ranges: RangeTable, rows: int, growth: float = 1.0) -> RangeTable:
    """A table of so many rows, its peaks `growth` times as large."""
    copies = -(-rows // len(ranges))
    frames = [
        ranges.frame.with_columns(node=pl.col("node") + f"_copy{i}", module=pl.lit(f"copy{i}.") + pl.col("module"))
        for i in range(copies)
    ]
    grown = [pl.col(name) * growth for name in ("min", "max", "absmax", "rms")]
    return dataclasses.replace(ranges, frame=pl.concat(frames).head(rows).with_columns(grown))


def seconds(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Median wall time."""
    run()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def command(*arguments: str) -> Callable[[], None]:
    """Run `calibcast` in a process of its own."""

    def run() -> None:
        subprocess.run(
            [sys.executable, "-m", "calibcast", *arguments],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT / ".package")},
        )  # fmt: skip

    return run


def table_rows(ranges: RangeTable, folder: Path) -> list[tuple[str, float, str]]:
    """What 10,000 tensors take."""
    old, new = repeated(ranges, 10_000), repeated(ranges, 10_000, growth=300.0)
    anew = dataclasses.replace(new, calibration=dataclasses.replace(new.calibration, digests={"another": "export"}))
    old.save(folder / "old.parquet")
    new.save(folder / "new.parquet")

    def changed(other: RangeTable) -> str:
        diff = range_diff(old, other)
        return diff_text(diff, tensor_decision_diff(diff), "tensors alone", 20)

    paths = str(folder / "old.parquet"), str(folder / "new.parquet")
    return [
        ("load", seconds(lambda: RangeTable.load(paths[0])), "< 2 s"),
        ("report, all rows as text", seconds(lambda: report_table(old)), "< 2 s"),
        ("filter and sort", seconds(lambda: report_frame(old, above=3, module="copy1", sort="rms")), "< 2 s"),
        ("diff with flips, same graph", seconds(lambda: changed(new)), "< 2 s"),
        ("diff with flips, exported anew", seconds(lambda: changed(anew)), "< 2 s"),
        ("`calibcast report`, whole process", seconds(command("report", paths[0], "--above", "3"), 3), "< 2 s"),
        ("`calibcast diff`, whole process", seconds(command("diff", *paths), 3), "< 2 s"),
    ]


def what_if_rows(program: ExportedProgram, ranges: RangeTable) -> list[tuple[str, float, str]]:
    """What 5,000 nodes take, weights hashed and facts read again in every call."""
    limits, types = [2.0, 3.0, 8.0, 512.0], [torch.float16, torch.bfloat16]
    return [
        ("what_if, 1 setting", seconds(lambda: what_if(program, ranges, 3.0)), "< 1 s"),
        ("what_if, 4 limits", seconds(lambda: what_if(program, ranges, limits)), "< 1 s"),
        (
            "what_if, 4 limits, fp16 and bf16",
            seconds(lambda: what_if(program, ranges, limits, types)),
            "",
        ),
        ("classify, for comparison", seconds(lambda: classify(program, ranges)), ""),
    ]


def page_rows(program: ExportedProgram, ranges: RangeTable, folder: Path) -> list[tuple[str, float, str]]:
    """What a page of 3,000 tensors takes to make and to open."""
    plan = classify(program, ranges, data_max=3.0)
    activations = ranges.frame.filter(pl.col("kind") == "activation").head(3000)
    table = dataclasses.replace(ranges, frame=activations)
    file = folder / "report.html"
    file.write_text(html_report(table, plan), encoding="utf-8")
    rows = [
        ("make the page", seconds(lambda: html_report(table, plan)), ""),
        (f"its size, {file.stat().st_size / 1e6:.2f} MB", float("nan"), "< 6 MB"),
    ]
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None:
        return [*rows, ("open the page: no Chromium here", float("nan"), "< 3 s")]
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})

        def open_page() -> None:
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready=yes]", timeout=60_000)

        def move() -> None:
            page.fill("#limit-text", "2.5")
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")

        rows += [("open it until it can be used", seconds(open_page), "< 3 s"), ("move the slider", seconds(move), "")]
        browser.close()
    return rows


def main() -> None:
    """Measure all, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="markdown file to write")
    arguments = parser.parse_args()
    program, ranges = measured()
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections = {
            "10,000 tensors": table_rows(ranges, folder),
            f"{nodes} nodes": what_if_rows(program, ranges),
            "A page of 3,000 tensors": page_rows(program, ranges, folder),
        }
    lines = ["# How long a reviewer waits", "", machine.header()]
    for title, rows in sections.items():
        lines += [f"## {title}", "", "| what | seconds | target |", "| --- | --- | --- |"]
        lines += [f"| {what} | {'' if taken != taken else f'{taken:.2f}'} | {target} |" for what, taken, target in rows]
        lines.append("")
    machine.write(arguments.output, "\n".join(lines))


if __name__ == "__main__":
    main()
