"""Networks that get no engine, or a wrong one, from TensorRT-RTX on GPUs that it does not support (a GPU is needed).

    python benchmarks/hard_networks.py --output benchmarks/results/hard_networks.md [--networks NAME ..]

Each is built with on_failure="fallback", in a process of its own, and the engine that comes of it is held against fp32
on batches that no calibration saw. "ends in": an engine, or the error. Seen on an H100 under RTX 1.4: the latent
decoder gets no engine in any precision, the denoiser none in fp32, ConvNeXt-T and EfficientNet-B0 none in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_HEADER = (
    "| network | type | ends in | nodes in PyTorch | SQNR dB | asked dB | builds s | remedies |",
    "|---|---|---|---|---|---|---|---|",
)


class Residual(nn.Module):
    """Two convolutions behind group norms, a time, and a skip that is a 1 x 1 convolution where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(32, before), nn.GroupNorm(32, after)])
        self.first, self.second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.time = nn.Linear(512, after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(F.silu(self.norms[0](x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norms[1](h)))


class LatentDecoder(nn.Module):
    """From latents to images, upsampled twice. large: its residual stream passes 65504, as a known decoder's does."""

    def __init__(self, width: int = 128, large: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4 * width, 3, padding=1)
        widths = ((4 * width, 4 * width), (4 * width, 2 * width), (2 * width, width))
        self.blocks = nn.ModuleList(Residual(before, after) for before, after in widths)
        self.norm, self.last = nn.GroupNorm(32, width), nn.Conv2d(width, 3, 3, padding=1)
        with torch.no_grad():
            for scale, block in zip((30000.0, 60000.0, 300.0) if large else (), self.blocks, strict=False):
                block.second.weight.mul_(scale)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        t, x = torch.zeros(z.shape[0], 512, device=z.device), self.first(z)
        for number, block in enumerate(self.blocks):
            x = block(x, t)
            x = F.interpolate(x, scale_factor=2.0) if number < 2 else x
        return self.last(F.silu(self.norm(x)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, height, across = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, 3, 4, width // 4, height * across).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(mixed.reshape(batch, width, height, across))


class Denoiser(nn.Module):
    """A denoiser of latents 64 x 64, three scales, with a timestep up to 999."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        c = width
        self.time = nn.ModuleList([nn.Linear(128, 512), nn.Linear(512, 512)])
        self.first, self.last = nn.Conv2d(4, c, 3, padding=1), nn.Conv2d(c, 4, 3, padding=1)
        self.norm = nn.GroupNorm(32, c)
        self.down = nn.ModuleList([Residual(c, c), Residual(c, 2 * c), Residual(2 * c, 4 * c)])
        self.pool = nn.ModuleList([nn.Conv2d(c, c, 3, 2, 1), nn.Conv2d(2 * c, 2 * c, 3, 2, 1)])
        self.middle = nn.ModuleList([Residual(4 * c, 4 * c), Residual(4 * c, 4 * c)])
        self.attention = Attention(4 * c)
        self.up = nn.ModuleList([Residual(8 * c, 2 * c), Residual(4 * c, c), Residual(2 * c, c)])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        f = torch.exp(-math.log(10000) * torch.arange(64, device=x.device) / 64)
        e = torch.cat([torch.cos(t[:, None] * f), torch.sin(t[:, None] * f)], -1)
        e = self.time[1](F.silu(self.time[0](e)))
        first = self.down[0](self.first(x), e)
        second = self.down[1](self.pool[0](first), e)
        third = self.down[2](self.pool[1](second), e)
        y = self.middle[1](self.attention(self.middle[0](third, e)), e)
        y = self.up[0](torch.cat([y, third], 1), e)
        y = self.up[1](torch.cat([F.interpolate(y, scale_factor=2.0), second], 1), e)
        y = self.up[2](torch.cat([F.interpolate(y, scale_factor=2.0), first], 1), e)
        return self.last(F.silu(self.norm(y)))


def _noise(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _vision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "latent_decoder": (LatentDecoder, lambda s: (_noise(4, 4, 32, 32)(s),)),
    "latent_decoder_small": (lambda: LatentDecoder(64, large=False), lambda s: (_noise(4, 4, 32, 32)(s),)),
    "residual_1x1_skip": (lambda: Alone(Residual(128, 64)), lambda s: (_noise(4, 128, 32, 32)(s),)),
    "denoiser": (Denoiser, lambda s: (_noise(4, 4, 64, 64)(s), _noise(4)(s).abs() * 300)),
    "convnext_tiny": (lambda: _vision("convnext_tiny"), lambda s: (_noise(8, 3, 224, 224)(s),)),
    "efficientnet_b0": (lambda: _vision("efficientnet_b0"), lambda s: (_noise(8, 3, 224, 224)(s),)),
}


class Alone(nn.Module):
    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, torch.zeros(x.shape[0], 512, device=x.device))


def measured(network: str, kind: str) -> dict[str, Any]:
    from calibcast import build, calibrate, classify, insert_casts, verify

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    make, batch = NETWORKS[network]
    batches = [tuple(value.cuda() for value in batch(seed)) for seed in range(4)]
    program = torch.export.export(make().eval().cuda(), batches[0])
    ranges = calibrate(program, batches[:2], progress=False)
    plan = None
    if kind != "fp32":
        plan = classify(program, ranges, low_precision_type={"fp16": torch.float16, "bf16": torch.bfloat16}[kind])
    mixed = program if plan is None else insert_casts(program, plan)
    start = time.perf_counter()
    engine = build(mixed, plan, ranges, backend="tensorrt", cache=False, progress=False, on_failure="fallback",
                   batches=batches[:2], reference=program)  # fmt: skip
    seconds = time.perf_counter() - start
    report = verify(engine, program, batches[2:], progress=False)
    trial = engine.record.get("trial") or {}
    return {
        "ends": "a wrong engine" if engine.record["trial_problem"] else "an engine",
        "torch": len(engine.record["fallback_to_pytorch"]),
        "sqnr": report.frame["sqnr_db"].min(),
        "asked": min((output["asked_db"] for output in trial.get("outputs", ())), default=math.nan),
        "seconds": seconds,
        "remedies": "; ".join(engine.record["remedies"])[:300],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--types", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--seconds", type=float, default=300.0, help="for each network and type")
    parser.add_argument("--at-once", type=int, default=1, help="so many processes build at one time")
    parser.add_argument("--output")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*options.child)))
        return
    from benchmarks import machine

    rows = []
    with ThreadPoolExecutor(options.at_once) as pool:
        asked = [(network, kind, options.seconds) for network in options.networks for kind in options.types]
        for row in pool.map(_row, *zip(*asked, strict=True)):
            rows.append(row)
            text = "\n".join([*_HEADER, *rows])
            machine.write(options.output, "# Networks that are hard to build\n\n" + machine.header() + "\n" + text)


def _row(network: str, kind: str, seconds: float) -> str:
    command = [sys.executable, __file__, "--child", network, kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"| {network} | {kind} | not done in {seconds:.0f} s | | | | | |"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return f"| {network} | {kind} | {said[:300].replace('|', '/')} | | | | | |"
    row = json.loads(lines[-1])
    return (
        f"| {network} | {kind} | {row['ends']} | {row['torch']} | {row['sqnr']:.1f} | {row['asked']:.1f} | "
        f"{row['seconds']:.0f} | {row['remedies'].replace('|', '/')} |"
    )


if __name__ == "__main__":
    main()
