"""`calibcast demo`: all stages on real handwritten digits, with a network that fails in fp16."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from calibcast.calib.artifacts import save_program
from calibcast.calib.calibration import calibrate
from calibcast.calib.text_table import Column, text_table
from calibcast.engines.building import build
from calibcast.engines.engine import Engine
from calibcast.engines.judging.report import VerificationReport
from calibcast.engines.judging.verification import verify
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from torch import nn
from torch.export import Dim, ExportedProgram

DATA = Path(__file__).parent / "demo_data" / "digits.parquet"
TRAIN, CALIBRATION = 997, 200  # of 1797 images; the other 600 are held out
BATCH = 100
CLASSES = 10
_STAYED = (Column("node", "node", 10), Column("rule", "rule", 9), Column("reason", "reason", wrap=True))
# The images have values 0..16. Cameras and image files give 0..255, so the network is trained on that range.
FULL_SCALE = 255.0 / 16.0


class EnergyClassifier(nn.Module):
    """Reads an image column by column: each column's energy and shape, and attention over the columns that are not
    blank.

    Like real networks it does things that fail in fp16: `energy` sums squares of raw pixels and exceeds 65504; the
    epsilon of the division, 1e-8, is zero in fp16, so a blank column becomes 0 / 0; and the mask's -1e9 becomes -inf,
    and 0 * -inf is NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(torch.zeros(8, 64))
        self.mix = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.score = nn.Linear(64, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: [N, 64], 0 to 255. Returns logits [N, 10]."""
        columns = pixels.view(-1, 8, 8).transpose(1, 2)  # [N, 8 columns, 8 rows]
        energy = (columns * columns).sum(-1, keepdim=True)  # [N, 8, 1]
        shape = columns / (energy.sqrt() + 1e-8)
        hidden = torch.relu(self.embed(shape) + self.position)
        hidden = self.mix(hidden)
        blank = (energy == 0).to(hidden.dtype)
        weights = torch.softmax(self.score(hidden) + blank * -1e9, dim=1)  # [N, 8, 1]
        logits: torch.Tensor = self.head(hidden * weights)
        return logits


@dataclass(frozen=True)
class Digits:
    """Batches of (pixels [N, 64] float32, 0 to 255; labels [N] int64)."""

    rows: datasets.Dataset

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self), BATCH):
            batch = self.rows[start : start + BATCH]
            yield batch["pixels"].float() * FULL_SCALE, batch["label"].long()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)


def pixels_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The model's input from a batch: a `transform`."""
    return batch[0]


def load_digits() -> tuple[Digits, Digits, Digits]:
    """The training, calibration and held-out parts of the shipped images, shuffled with a fixed seed."""
    with tempfile.TemporaryDirectory() as cache:
        progress = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bar()
        try:
            rows = datasets.Dataset.from_parquet(str(DATA), cache_dir=cache, keep_in_memory=True)
        finally:
            if progress:
                datasets.enable_progress_bar()
    rows = rows.with_format("torch").shuffle(seed=0, keep_in_memory=True)
    edges = (0, TRAIN, TRAIN + CALIBRATION, len(rows))
    parts = [rows.select(range(low, high), keep_in_memory=True) for low, high in pairwise(edges)]
    return Digits(parts[0]), Digits(parts[1]), Digits(parts[2])


def held_out() -> Digits:
    """The part that neither training nor calibration has seen: `--data engines/demo.py:held_out`."""
    return load_digits()[2]


def train(data: Digits, epochs: int = 60) -> EnergyClassifier:
    """A classifier trained in fp32 on `data`, in seconds."""
    torch.manual_seed(0)
    model = EnergyClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = list(data)
    for _ in range(epochs):
        for pixels, labels in batches:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def correct(output: torch.Tensor, reference: torch.Tensor, batch: Any) -> float:
    """Accuracy on one batch, a metric of `verify`. A row with NaN or Inf logits counts as wrong."""
    answers = torch.where(torch.isfinite(output).all(-1), output.argmax(-1), -1)
    return float((answers == batch[1]).float().mean())


@dataclass(frozen=True)
class Outcome:
    """Results of the demo: held-out accuracies (shares), and the share of logits that are NaN or Inf with everything in
    fp16."""

    fp32: float
    half: float
    half_nonfinite: float
    mixed: float
    plan: PrecisionPlan
    report: VerificationReport


def run_demo(folder: Path, say: Callable[[str], None] = print) -> Outcome:
    """Train, calibrate, plan, cast, build, verify; write every artifact into `folder`."""
    training, calibration, held = load_digits()
    say(f"1. train      {len(training)} images, fp32, on raw pixels 0..255")
    model = train(training)
    program = torch.export.export(
        model, (next(iter(training))[0],), dynamic_shapes={"pixels": {0: Dim("batch", min=1, max=1024)}}
    )
    say(f"2. calibrate  {len(calibration)} other images through the exported graph")
    ranges = calibrate(program, calibration, transform=pixels_of)
    say(f"              {ranges}")
    plan = classify(program, ranges)
    say("3. plan       which nodes can run in fp16, decided by their ranges")
    engine = build(insert_casts(program, plan), plan, ranges)
    say(f"4. build      backend {engine.backend}\n              {engine.why}")
    say(f"5. verify     {len(held)} held-out images\n")
    outcome = _judge(model, program, engine, held)
    _save(program, engine, outcome.report, folder)
    say(_table(outcome))
    say(_high_nodes(plan))
    say(_next_steps(folder))
    return outcome


def _judge(model: nn.Module, program: ExportedProgram, engine: Engine, held: Digits) -> Outcome:
    assert engine.plan is not None
    metrics = {"fp32 accuracy": lambda o, r, b: correct(r, r, b), "accuracy": correct}
    report = verify(engine, program, held, transform=pixels_of, metrics=metrics)
    half = copy.deepcopy(model).half()
    whole = verify(
        lambda pixels: half(pixels.half()), program, held, transform=pixels_of, metrics={"accuracy": correct}
    )
    return Outcome(
        fp32=report.metrics["fp32 accuracy"],
        half=whole.metrics["accuracy"],
        half_nonfinite=float(whole.frame["nonfinite"].sum()) / (len(held) * CLASSES),
        mixed=report.metrics["accuracy"],
        plan=engine.plan,
        report=report,
    )


def _save(program: ExportedProgram, engine: Engine, report: VerificationReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_program(program, folder / "program.pt2")
    assert engine.ranges is not None
    assert engine.plan is not None
    engine.ranges.save(folder / "ranges.parquet")
    engine.plan.save(folder / "plan.json")
    engine.save(folder / "engine")
    (folder / "verification.csv").write_text(report.frame.write_csv())


def _table(outcome: Outcome) -> str:
    high = len(outcome.plan.high_precision_nodes)
    low = len(outcome.plan.low_precision_nodes)
    rows = [
        ("fp32", outcome.fp32, "the reference"),
        (
            "everything fp16",
            outcome.half,
            f"{100 * outcome.half_nonfinite:.1f}% of its logits are NaN or Inf",
        ),
        ("calibcast's plan", outcome.mixed, f"{low} nodes in fp16, {high} stayed in fp32"),
    ]
    lines = [f"   {'':<18}{'accuracy':>9}"] + [
        f"   {name:<18}{100 * share:>8.2f}%   {note}" for name, share, note in rows
    ]
    return "\n".join(lines) + f"\n   output against fp32: {outcome.report.frame['sqnr_db'][0]:.1f} dB SQNR\n"


def _high_nodes(plan: PrecisionPlan) -> str:
    rows = []
    for name in plan.high_precision_nodes:
        decision = plan[name]
        # A tensor that overflows in storage is above data_max, too: report that only once.
        more = [verdict for verdict in decision.verdicts[1:] if verdict.rule != "storage"]
        rows.append({"node": name, "rule": decision.rule, "reason": decision.reason})
        rows += [{"node": "", "rule": verdict.rule, "reason": verdict.reason} for verdict in more]
    return "\n".join(["   the nodes that stayed in fp32:", *text_table(rows, _STAYED, indent="   "), ""])


def _next_steps(folder: Path) -> str:
    return (
        f"artifacts are in {folder}:\n"
        "   program.pt2, ranges.parquet, plan.json, engine/, verification.csv\n"
        "next:\n"
        f"   calibcast report {folder}/ranges.parquet \\\n      --plan {folder}/plan.json"
    )


logging.getLogger("datasets").setLevel(logging.ERROR)
