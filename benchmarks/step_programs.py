"""Plans for small programs whose results change by steps: codebooks, hard attention, top-k, spikes, grids, sorting.

    python benchmarks/step_programs.py --output benchmarks/results/step_programs.md [--tune]

Each is calibrated on four batches and judged on these and two more, by an emulated run: the worst channel of the worst
batch against the default budget, and the error over all of them, which is wrong from 2% (float16) or 5% (bfloat16) on.
"silent": misses of the budget by a plan that does not say "spread". Weights are random, as only the arithmetic counts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast import PlanError, PrecisionPlan, calibrate, classify, tune
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.masks import mask_tensors
from calibcast.calib.output_noise import channel_noise
from calibcast.calib.rounded_runner import RoundedRunner

from benchmarks import machine

SEEN, ALL, WIDTH = 4, 6, 32
WRONG = {torch.float16: 0.02, torch.bfloat16: 0.05}
Shape = tuple[int, ...]
PROGRAMS: dict[str, tuple[Callable[..., Tensor], list[Shape], Shape]] = {}


def program(shape: Shape, *weights: Shape) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Add a function to `PROGRAMS`. shape: of its input. weights: shapes of its other arguments."""

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        PROGRAMS[function.__name__] = function, list(weights), shape
        return function

    return add


def near(x: Tensor, codes: Tensor) -> Tensor:
    return (x[:, None] - codes[None]).square().sum(-1).argmin(-1)


def taken(x: Tensor, places: Tensor) -> Tensor:
    return torch.gather(x, 1, places[..., None].expand(-1, -1, x.shape[-1]))


@program((128, WIDTH), (16, WIDTH), (64, 16), (64, 24))
def codebook(x: Tensor, w: Tensor, codes: Tensor, v: Tensor) -> Tensor:
    return F.embedding(near(x @ w.T, codes), v)


@program((128, WIDTH), (16, WIDTH), (64, 16), (64, 16))
def residual_codebooks(x: Tensor, w: Tensor, first: Tensor, second: Tensor) -> Tensor:
    h = x @ w.T
    q = F.embedding(near(h, first), first)
    return q + F.embedding(near(h - q, second), second)


@program((256, WIDTH), (8, WIDTH), (24, 8))
def scalar_codes(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (torch.round(torch.tanh(x @ w.T) * 3.5) / 3.5) @ v.T


@program((128, WIDTH), (4, WIDTH), *[(24, WIDTH)] * 4)
def expert(x: Tensor, g: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    scores = (x @ g.T).softmax(-1)
    best = scores.argmax(-1)
    found = torch.stack([x @ a.T, x @ b.T, x @ c.T, x @ d.T], 1)
    return found[torch.arange(x.shape[0]), best] * scores.gather(1, best[:, None])


@program((128, WIDTH), (128, WIDTH), (24, 128))
def sparse_codes(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.relu(x @ w.T)
    top = h.topk(8, -1)
    return torch.zeros_like(h).scatter(-1, top.indices, top.values) @ v.T


@program((128, WIDTH), (64, WIDTH), (24, 64))
def kth_largest(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return torch.where(h >= h.topk(4, -1).values[:, -1:], h, torch.zeros_like(h)) @ v.T


@program((8, 32, WIDTH), (16, WIDTH), (16, WIDTH), (24, WIDTH))
def hard_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return taken(x @ v.T, ((x @ q.T) @ (x @ k.T).transpose(-1, -2)).argmax(-1))


@program((64, 8, WIDTH), (48, WIDTH), (24, 48))
def spikes(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    level, given = torch.zeros(x.shape[0], w.shape[0]), torch.zeros(x.shape[0], v.shape[0])
    for time in range(x.shape[1]):
        level = 0.9 * level + x[:, time] @ w.T
        fired = (level > 1).float()
        level, given = level - fired, given + fired @ v.T
    return given


@program((256, WIDTH), (6, WIDTH), (64, 24))
def hashes(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    return F.embedding(((x @ w.T > 0).long() * (2 ** torch.arange(6))).sum(-1), table)


@program((128, WIDTH), (64, WIDTH))
def nucleus(x: Tensor, w: Tensor) -> Tensor:
    p = (x @ w.T).softmax(-1)
    s, places = p.sort(-1, descending=True)
    kept = torch.where(s.cumsum(-1) - s < 0.9, s, 0.0)
    return torch.zeros_like(p).scatter(-1, places, kept / kept.sum(-1, keepdim=True))


@program((32, 16, WIDTH), (24, WIDTH), (24, 96))
def sorted_pool(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return taken(h, h[..., 0].argsort(-1)[:, :4]).flatten(1) @ v.T


@program((256, WIDTH), (48, WIDTH), (24, 48))
def dynamic_int4(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    scale = h.abs().amax(-1, keepdim=True) / 7
    return (torch.round(h / scale).clamp(-8, 7) * scale) @ v.T


@program((256, WIDTH), (48, WIDTH), (24, 48))
def ternary(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return (torch.sign(h) * (h.abs() > 0.5).float()) @ v.T


@program((256, WIDTH), (48, WIDTH), (24, 48))
def fractions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    p = x @ w.T * 4
    return (p - p.floor()) @ v.T


@program((256, WIDTH), (1, WIDTH), (34, 24))
def buckets(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    return F.embedding(torch.bucketize((x @ w.T)[:, 0], torch.linspace(-2, 2, 33)), table)


@program((256, WIDTH), (2, WIDTH), (512, 24))
def grid(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    u = torch.sigmoid(x @ w.T) * 15
    i, share = u.floor().long(), (u - u.floor())[:, :1]
    low, high = (F.embedding((i[:, 0] + more) * 16 + i[:, 1], table) for more in (0, 1))
    return low * (1 - share) + high * share


@program((256, WIDTH), (2, WIDTH), (512, 24))
def nearest_cell(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    i = (torch.sigmoid(x @ w.T) * 15).round().long()
    return F.embedding(i[:, 0] * 16 + i[:, 1], table)


@program((8, 32, WIDTH), (16, WIDTH), (16, WIDTH), (24, WIDTH))
def pruned_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (x @ q.T) @ (x @ k.T).transpose(-1, -2)
    return s.masked_fill(s < s.mean(-1, keepdim=True), float("-inf")).softmax(-1) @ (x @ v.T)


@program((256, WIDTH), (33, WIDTH), (24, 33))
def from_median(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return torch.tanh(h - h.median(-1, keepdim=True).values) @ v.T


@program((256, WIDTH), (32, WIDTH), (24, 32))
def ranks(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return (h.argsort(-1).argsort(-1).float() / h.shape[-1]) @ v.T


@program((256, WIDTH), (48, WIDTH), (48, WIDTH), (24, 48))
def threshold_gate(x: Tensor, w: Tensor, g: Tensor, v: Tensor) -> Tensor:
    h = x @ w.T
    return torch.where(x @ g.T > 0.3, h.tanh(), -h) @ v.T


@program((32, 24, WIDTH), (1, WIDTH), (48, WIDTH), (24, 48))
def pruned_tokens(x: Tensor, s: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.gelu(taken(x, (x @ s.T)[..., 0].topk(8, -1).indices) @ w.T).mean(1) @ v.T


@program((128, WIDTH), (64, WIDTH), (24, 64))
def unpooled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    pooled, places = F.max_pool1d((x @ w.T).reshape(x.shape[0], 1, -1), 4, return_indices=True)
    return F.max_unpool1d(pooled, places, 4)[:, 0] @ v.T


@program((32, 32, WIDTH), (16, WIDTH), (24, 16))
def histogram(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h, edges = (x @ w.T).flatten(1)[..., None], torch.linspace(-3, 3, 17)
    return ((h >= edges[:-1]) & (h < edges[1:])).float().mean(1) @ v.T


@program((256, WIDTH), (16, WIDTH), (24, 16))
def wrapped_angles(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.cos(torch.remainder(x @ w.T * 20, 2 * math.pi)) @ v.T


@program((256, WIDTH), (64, WIDTH), (64, 24))
def beam(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    top = (x @ w.T).log_softmax(-1).topk(3, -1)
    return (F.embedding(top.indices, table) * top.values.softmax(-1)[..., None]).sum(1)


class Applied(nn.Module):
    """A function with seeded weights."""

    def __init__(self, function: Callable[..., Tensor], shapes: Sequence[Shape]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.function = function
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[-1])) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: as in `PROGRAMS`."""
        return self.function(x, *self.weights)


@dataclass(frozen=True)
class Outcome:
    """What a plan gave. worst: dB of the worst channel. error: over all batches. silent: misses its budget, unsaid."""

    high: int
    nodes: int
    predicted: float
    worst: float
    error: float
    silent: bool
    wrong: bool
    spread: bool


def outcome(name: str, low: torch.dtype, tuned: bool) -> Outcome | str:
    """Plan a program and run the plan; why there is no plan where `tune` refuses."""
    function, shapes, shape = PROGRAMS[name]
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randn(shape, generator=generator) for _ in range(ALL)]
    exported = torch.export.export(Applied(function, shapes).eval(), (batches[0],))
    ranges = calibrate(exported, batches[:SEEN], progress=False)
    try:
        plan = (
            tune(exported, ranges, batches[:SEEN], low_precision_type=low)
            if tuned
            else classify(exported, ranges, low_precision_type=low)
        )
    except PlanError as error:
        return str(error)
    return _judged(exported, plan, batches)


def _judged(exported: Any, plan: PrecisionPlan, batches: Sequence[Tensor]) -> Outcome:
    low = plan.low_precision_type
    run = RoundedRunner(exported, plan.low_precision_nodes, low, mask_tensors(exported))
    reference = ProgramRunner(exported)
    worst, noise, power = 0.0, 0.0, 0.0
    for x in batches:
        ours, theirs = run.run([x])[0], reference.run([x])[0]
        worst = max(worst, float(channel_noise(ours, theirs).max()))
        noise += float((ours - theirs).double().square().sum())
        power += float(theirs.double().square().sum())
    db = -10 * math.log10(worst) if worst else math.inf
    error, summary = math.sqrt(noise / power), plan.rounding
    assert summary is not None
    missed = db < summary.min_sqnr_db
    high, nodes = len(plan.high_precision_nodes), len(plan.decisions)
    silent, wrong = missed and not summary.spread, error > WRONG[low]
    return Outcome(high, nodes, summary.predicted_sqnr_db, db, error, silent, wrong, summary.spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--tune", action="store_true", help="by tune on the four batches, in place of classify")
    parser.add_argument("--output")
    given = parser.parse_args()
    lines = [
        "| program | type | fp32 nodes | predicted dB | worst channel dB | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    found: list[Outcome | str] = []
    for name in given.names:
        for low in WRONG:
            one = outcome(name, low, given.tune)
            found.append(one)
            kind = str(low).removeprefix("torch.")
            if isinstance(one, str):
                lines.append(f"| {name} | {kind} | | | | | refused: {one.splitlines()[0][:160]} |")
                continue
            said = [word for word in ("silent", "wrong", "spread") if getattr(one, word)]
            cells = f"{one.high} of {one.nodes} | {one.predicted:.1f} | {one.worst:.1f} | {one.error:.4f}"
            lines.append(f"| {name} | {kind} | {cells} | {', '.join(said)} |")
    plans = [one for one in found if isinstance(one, Outcome)]
    silent, wrong, high = (sum(getattr(one, name) for one in plans) for name in ("silent", "wrong", "high"))
    total = (
        f"{len(found)} cases: {len(found) - len(plans)} refused, {silent} miss the budget without a word, {wrong} are "
        f"wrong; {high} nodes in fp32."
    )
    text = f"# Programs with steps\n\n{machine.header()}\n{total}\n\n" + "\n".join(lines)
    machine.write(given.output, text)


if __name__ == "__main__":
    main()
