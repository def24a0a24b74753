"""Two whole pipelines from eager fp32 to engines, calibrated on what they really call their networks with.

    python benchmarks/pipelines.py --output benchmarks/results/pipelines.md             eager backend, on a CPU
    python benchmarks/pipelines.py --backend tensorrt --device cuda --output ...        on a GPU

A denoiser of images of digits over 10 steps, and a decoder of text with a static KV cache: a prompt of 16 characters,
then 32 steps. Both are small and are trained here, on scikit-learn's digits and on Python's own documentation strings.
The pipeline runs once while `recorded` keeps the calls; `calibrate` (for the decoder with carried state), `classify`,
`insert_casts` and `build` follow; then the pipeline runs with the engine in the place of its network, from other seeds
and prompts, and its own output is judged: images by SQNR, text by tokens that are the same.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibcast import NewSequence, build, calibrate, classify, insert_casts, recorded, verify

from benchmarks import machine

STEPS, PROMPT, WRITTEN, LENGTH = 10, 16, 32, 64
Call = Callable[..., Any]


class Denoiser(nn.Module):
    """Predicts the noise in images of 8 x 8 at a time from 0 to 1."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        when = self.time(torch.stack([torch.cos(math.pi * t), torch.sin(math.pi * t)], -1))[:, :, None, None]
        h = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(F.silu(norm(h) + when))
        return self.last(F.silu(h))


class Decoder(nn.Module):
    """Two layers over characters. `forward` takes one character and where it stands, and keeps keys and values."""

    def __init__(self, characters: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.layers = heads, layers
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.end, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for layer in range(layers):
            for kind in ("keys", "values"):
                self.register_buffer(f"{kind}_{layer}", torch.zeros(1, heads, LENGTH, width // heads))

    def _split(self, layer: int, x: torch.Tensor) -> list[torch.Tensor]:
        batch, length, width = x.shape
        parts = self.qkv[layer](self.norms[2 * layer](x)).view(batch, length, 3, self.heads, width // self.heads)
        return list(parts.permute(2, 0, 3, 1, 4).unbind(0))

    def _after(self, layer: int, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x = x + self.mix[layer](mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down[layer](F.gelu(self.up[layer](self.norms[2 * layer + 1](x))))

    def forward(self, character: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        x = self.embed(character) + self.place(place)
        seen = torch.where(torch.arange(LENGTH, device=x.device) <= place, 0.0, -1e4)
        for layer in range(self.layers):
            q, k, v = self._split(layer, x)
            keys, values = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            keys.index_copy_(2, place, k)
            values.index_copy_(2, place, v)
            scores = (q @ keys.transpose(-1, -2)) * (q.shape[-1] ** -0.5) + seen
            x = self._after(layer, x, scores.softmax(-1) @ values)
        return self.head(self.end(x))[:, -1]

    def whole(self, characters: torch.Tensor) -> torch.Tensor:
        """All places of a text at once, for training."""
        x = self.embed(characters) + self.place(torch.arange(characters.shape[1]))
        for layer in range(self.layers):
            q, k, v = self._split(layer, x)
            x = self._after(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.end(x))


def trained_denoiser(steps: int) -> Denoiser:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        x, t = images[torch.randint(len(images), (64,))], torch.rand(64)
        noise = torch.randn_like(x)
        noisy = (
            torch.cos(t * math.pi / 2)[:, None, None, None] * x
            + torch.sin(t * math.pi / 2)[:, None, None, None] * noise
        )
        loss = F.mse_loss(model(noisy, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sampled(network: Call, seed: int, device: str) -> torch.Tensor:
    """16 images from noise, in 10 deterministic steps."""
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
    times = torch.linspace(0.98, 0.02, STEPS + 1)
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        noise = network(x, torch.full((16,), now, device=device))
        clean = (x - math.sin(now * math.pi / 2) * noise) / math.cos(now * math.pi / 2)
        x = math.cos(then * math.pi / 2) * clean.clamp(-1.5, 1.5) + math.sin(then * math.pi / 2) * noise
    return x


def text() -> str:
    import argparse as a
    import collections
    import functools
    import json
    import logging
    import os
    import random
    import statistics

    found = []
    for module in (a, collections, functools, json, logging, os, random, statistics):
        documented = [module, *(value for value in vars(module).values() if callable(value))]
        found += [doc for one in documented if isinstance(doc := getattr(one, "__doc__", None), str)]
    return "\n".join(found)


def trained_decoder(steps: int) -> tuple[Decoder, list[str], torch.Tensor]:
    """(model, the characters, the text as numbers)."""
    torch.manual_seed(0)
    written = text()
    characters = sorted(set(written))
    numbers = torch.tensor([characters.index(one) for one in written])
    model = Decoder(len(characters))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        starts = torch.randint(len(numbers) - LENGTH - 1, (16,))
        x = torch.stack([numbers[start : start + LENGTH] for start in starts])
        y = torch.stack([numbers[start + 1 : start + LENGTH + 1] for start in starts])
        loss = F.cross_entropy(model.whole(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), characters, numbers


def continued(network: Call, prompt: torch.Tensor, device: str) -> list[int]:
    """The prompt, one character after another, and then the likeliest 32."""
    given, written = prompt.tolist(), list[int]()
    for place in range(PROMPT + WRITTEN - 1):
        character = given[place] if place < PROMPT else written[-1]
        logits = network(torch.tensor([[character]], device=device), torch.tensor([place], device=device))
        if place >= PROMPT - 1:
            written.append(int(logits.argmax()))
    return written


def sequenced(decoder: Decoder) -> Call:
    """A decoder in PyTorch, its cache cleared: what a program's `module()` does not do."""
    for name, buffer in decoder.named_buffers():
        if name.startswith(("keys", "values")):
            buffer.zero_()
    return decoder


def diffusion(options: argparse.Namespace) -> str:
    model = trained_denoiser(options.steps).to(options.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with recorded(model, f"{folder}/calls") as calls:
            sampled(model, 1, options.device)
        args, kwargs = calls[0].batch
        number = len(calls)
        args = tuple(value.to(options.device) for value in args)
        program = torch.export.export(model, args, kwargs)
        ranges = calibrate(program, calls, progress=False)
        plan = classify(program, ranges)
        engine = build(insert_casts(program, plan), plan, ranges, backend=options.backend, progress=False)
        with recorded(model, f"{folder}/held") as held:
            theirs = sampled(model, 2, options.device)
        report = verify(engine, program, held, progress=False)
        start = time.perf_counter()
        ours = sampled(engine, 2, options.device)
        seconds = time.perf_counter() - start
    sqnr = 10 * math.log10(float(theirs.square().sum() / (ours - theirs).square().sum()))
    worst = report.frame["sqnr_db"].min()
    nodes = f"{len(plan.low_precision_nodes)} / {len(plan.high_precision_nodes)}"
    return (
        f"| denoiser, {STEPS} steps | {number} | {nodes} | {worst:.1f} dB | images: {sqnr:.1f} dB "
        f"| {engine.backend}, {seconds:.2f} s |"
    )


def decoding(options: argparse.Namespace) -> str:
    model, _, numbers = trained_decoder(options.steps)
    model = model.to(options.device)
    prompts = [numbers[start : start + PROMPT] for start in range(0, 20_000, 2_500)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with recorded(model, f"{folder}/calls", when_full="stop") as calls:
            for prompt in prompts[:4]:
                calls.new_sequence()
                continued(sequenced(model), prompt, options.device)
        sequenced(model)
        args, number = tuple(value.to(options.device) for value in calls[0].batch[0]), len(calls)
        program = torch.export.export(model, args)
        ranges = calibrate(program, calls, progress=False, carry_state=True)
        plan = classify(program, ranges)
        engine = build(insert_casts(program, plan), plan, ranges, backend=options.backend, progress=False)
        same = total = 0
        seconds = 0.0
        with recorded(model, f"{folder}/held", when_full="stop") as held:
            wanted = []
            for prompt in prompts[4:]:
                held.new_sequence()
                wanted.append(continued(sequenced(model), prompt, options.device))
        sequenced(model)
        assert sum(isinstance(call, NewSequence) for call in held) == len(wanted)
        report = verify(engine, program, held, progress=False, carry_state=True)
        for prompt, theirs in zip(prompts[4:], wanted, strict=True):
            engine.reset()
            start = time.perf_counter()
            ours = continued(engine, prompt, options.device)
            seconds += time.perf_counter() - start
            same += sum(mine == other for mine, other in zip(ours, theirs, strict=True))
            total += len(theirs)
    worst = report.frame["sqnr_db"].min()
    return (
        f"| decoder, {PROMPT} + {WRITTEN} steps | {number} | {len(plan.low_precision_nodes)} / "
        f"{len(plan.high_precision_nodes)} | {worst:.1f} dB, in sequence | tokens: {same} of {total} the same "
        f"| {engine.backend}, {seconds / len(wanted):.2f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = [
        "| pipeline | calls recorded | nodes low / high | each call | the pipeline's own output | with the engine |",
        "|---|---|---|---|---|---|",
    ]
    for pipeline in (diffusion, decoding):
        rows.append(pipeline(options))
        machine.write(options.output, "# Whole pipelines\n\n" + machine.header() + "\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
