"""Small networks that are trained here, each in well under a minute on one core, with a fixed seed and nothing kept.

The text is Python's own manual, the digits are those of the demo; scikit-learn has the photographs and the cells, the
package vega_datasets the weather.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.trained import data
from benchmarks.trained.learned_models import (
    Characters,
    Denoiser,
    Forecaster,
    Physical,
    RadianceField,
    Restorer,
    VisionTransformer,
)
from benchmarks.trained.subject import Batch, Entry, Run, Subject


def _fit(model: nn.Module, loss: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """Adam with one cycle of the learning rate; on a GPU where there is one, though `loss` has its data on the host."""
    hooks = []
    if torch.cuda.is_available():
        model.cuda()
        hooks.append(model.register_forward_pre_hook(lambda _, inputs: tuple(value.cuda() for value in inputs)))
        hooks.append(model.register_forward_hook(lambda *called: called[-1].cpu()))
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    for hook in hooks:
        hook.remove()
    model.cpu()


def _accuracy(labels: Sequence[torch.Tensor], batches: Sequence[Batch]) -> Callable[[Run], float]:
    def percent(run: Run) -> float:
        right = [(run(*batch)[0].argmax(-1) == label) for batch, label in zip(batches, labels, strict=True)]
        return 100 * float(torch.cat(right).float().mean())

    return percent


def peak_db(clean: torch.Tensor, image: torch.Tensor) -> float:
    """PSNR of what is within 1, dB."""
    error = float((clean - image).double().square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def characters(width: int = 96, layers: int = 3, steps: int = 250, batch: int = 4, length: int = 384) -> Subject:
    """A character model with rope, trained on 64 characters at a time and run on 384."""
    ids, model = data.characters(), Characters(width, layers)
    split, trained = int(0.8 * len(ids)), 64

    def loss() -> torch.Tensor:
        starts = torch.randint(0, split - trained - 1, (24,))
        lines = torch.stack([ids[start : start + trained + 1] for start in starts.tolist()])
        return F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())

    _fit(model, loss, steps, 4e-3)
    windows = ids[split:].unfold(0, length + 1, length + 1)
    chosen = [windows[i : i + batch] for i in range(0, 8 * batch, batch)]

    def perplexity(run: Run) -> float:
        losses = [F.cross_entropy(run(b[:, :-1])[0].flatten(0, 1), b[:, 1:].flatten()) for b in chosen[4:]]
        return float(torch.stack(losses).mean().exp())

    batches: list[Batch] = [(b[:, :-1].contiguous(),) for b in chosen]
    return Subject(model, batches[:4], batches[4:], perplexity, "perplexity")


def _rays(count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """From places about (0, 0, 2), downwards: origins and directions, [count, 3]."""
    origin = torch.cat([torch.rand(count, 2, generator=draw) - 0.5, torch.full((count, 1), 2.0)], -1)
    slope = 0.8 * (torch.rand(count, 2, generator=draw) - 0.5)
    return origin, torch.cat([slope, torch.full((count, 1), -1.0)], -1)


def _seen(sheet: torch.Tensor, origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """What rays see of two sheets of handwriting: ink on glass at height 0.4, and paper below it at -0.4."""

    def at(height: float, page: torch.Tensor) -> torch.Tensor:
        place = origin[:, :2] + direction[:, :2] * (2.0 - height)
        return F.grid_sample(page[None, None], place[None, None], align_corners=False, padding_mode="border")[0, 0, 0]

    ink, paper = at(0.4, sheet), at(-0.4, sheet.flip(0))
    return torch.where(ink > 0.5, 0.9, 0.1 + 0.5 * paper)


def radiance_field(width: int = 64, steps: int = 500, rays: int = 1024) -> Subject:
    """A NeRF of ink on glass above a page, both of real handwriting."""
    images = data.digits()[0][:9].view(3, 3, 8, 8)
    sheet = images.permute(0, 2, 1, 3).reshape(24, 24)
    model, draw = RadianceField(width), torch.Generator().manual_seed(0)

    def loss() -> torch.Tensor:
        drawn = _rays(384, draw)
        return F.mse_loss(model(*drawn), _seen(sheet, *drawn))

    _fit(model, loss, steps, 1e-2)
    batches = [_rays(rays, draw) for _ in range(8)]

    def quality(run: Run) -> float:
        return peak_db(torch.cat([_seen(sheet, *b) for b in batches[4:]]), torch.cat([run(*b)[0] for b in batches[4:]]))

    return Subject(model, list(batches[:4]), list(batches[4:]), quality, "PSNR, dB")


def massive_channels(width: int = 64, steps: int = 300) -> Subject:
    """A ViT of digits, two channels of whose stream are raised to 2000 after two thirds of its training."""
    (images, labels), model = data.digits(), VisionTransformer(width)

    def loss() -> torch.Tensor:
        chosen = torch.randint(0, 997, (64,))
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    _fit(model, loss, 2 * steps // 3, 3e-3)
    model.plant()
    _fit(model, loss, steps // 3, 1e-3)
    return _classified(model, images, labels)


def _classified(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Subject:
    parts = list(images[997:].split(100)), list(labels[997:].split(100))
    batches: list[Batch] = [(part,) for part in parts[0]]
    return Subject(model, batches[:4], batches[4:], _accuracy(parts[1][4:], batches[4:]), "accuracy, %")


def demo_classifier() -> Subject:
    """The demo's classifier of digits: sums of squares, a tiny divisor, a mask."""
    from calibcast.engines.demo import load_digits, train

    training, calibration, held_out = load_digits()
    model = train(training)
    batches: list[list[Batch]] = [[(pixels,) for pixels, _ in part] for part in (calibration, held_out)]
    return Subject(model, *batches, _accuracy([label for _, label in held_out], batches[1]), "accuracy, %")


def diffusion(width: int = 24, steps: int = 250, batch: int = 32) -> Subject:
    """A diffusion network of digits; time steps to 999 become sines in `forward`."""
    images, model = 2 * data.digits()[0] - 1, Denoiser(width)
    kept = torch.cos(torch.linspace(0, 1, 1000) * math.pi / 2 * 0.99).square()  # of the image's power, at each step
    draw = torch.Generator().manual_seed(0)

    def noisy(first: int, last: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        clean = images[torch.randint(first, last, (count,), generator=draw)]
        step, noise = torch.randint(0, 1000, (count,), generator=draw), torch.randn(clean.shape, generator=draw)
        share = kept[step][:, None, None, None]
        return share.sqrt() * clean + (1 - share).sqrt() * noise, step, noise

    def loss() -> torch.Tensor:
        image, step, noise = noisy(0, 997, 48)
        return F.mse_loss(model(image, step), noise)

    _fit(model, loss, steps, 3e-3)
    batches: list[Batch] = [noisy(*((997, 1397) if i < 4 else (1397, 1797)), batch)[:2] for i in range(8)]
    start = torch.randn(32, 1, 8, 8, generator=draw)

    def likeness(run: Run) -> float:
        with torch.no_grad():
            theirs = _sampled(lambda image, step: [model(image, step)], start, kept)
        return peak_db(theirs / 2, _sampled(run, start, kept) / 2)

    return Subject(model, batches[:4], batches[4:], likeness, "PSNR of samples to fp32's, dB")


def _sampled(run: Run, image: torch.Tensor, kept: torch.Tensor, steps: int = 20) -> torch.Tensor:
    """DDIM from noise."""
    times = torch.linspace(999, 0, steps + 1).long().tolist()
    for now, then in pairwise(times):
        noise = run(image, torch.full((len(image),), now))[0]
        clean = ((image - (1 - kept[now]).sqrt() * noise) / kept[now].sqrt()).clamp(-1, 1)
        image = kept[then].sqrt() * clean + (1 - kept[then]).sqrt() * noise
    return image


def restorer(width: int = 16, steps: int = 200) -> Subject:
    """A network that takes noise out of photographs, trained on one and judged on another."""
    (temple, flower), model = data.photographs(), Restorer(width)
    draw = torch.Generator().manual_seed(0)

    def noisy(clean: torch.Tensor) -> torch.Tensor:
        return clean + 0.1 * torch.randn(clean.shape, generator=draw)

    def loss() -> torch.Tensor:
        clean = data.patches(temple, 32, 8, int(torch.randint(0, 10**6, ())))
        return F.mse_loss(model(noisy(clean)), clean)

    _fit(model, loss, steps, 1e-2)
    clean = [data.patches(temple if i < 4 else flower, 64, 2, i) for i in range(8)]
    batches: list[Batch] = [(noisy(part),) for part in clean]

    def quality(run: Run) -> float:
        return peak_db(torch.cat(clean[4:]), torch.cat([run(*batch)[0] for batch in batches[4:]]))

    return Subject(model, batches[:4], batches[4:], quality, "PSNR, dB")


def forecaster(width: int = 48, steps: int = 200) -> Subject:
    """An LSTM that forecasts temperatures, from seconds since 1970 and degrees."""
    series = data.weather()
    windows = series.unfold(0, 72, 7)  # [window, seconds and degrees, hour]
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))  # January to September; then the rest
    windows = torch.cat([windows[:900][order], windows[900:]])
    seconds, degrees = windows[:, 0, :48].float(), windows[:, 1].float()
    model = Forecaster(float(series[0, 0]), width)

    def loss() -> torch.Tensor:
        chosen = torch.randint(0, 772, (64,))
        return F.l1_loss(model(seconds[chosen], degrees[chosen, :48]), degrees[chosen, 48:])

    _fit(model, loss, steps, 1e-2)
    parts = [slice(772 + 32 * i, 804 + 32 * i) for i in range(8)]
    batches: list[Batch] = [(seconds[part], degrees[part, :48].contiguous()) for part in parts]

    def error(run: Run) -> float:
        got = torch.cat([run(*batch)[0] for batch in batches[4:]])
        return float((got - torch.cat([degrees[part, 48:] for part in parts[4:]])).abs().mean())

    return Subject(model, batches[:4], batches[4:], error, "mean error, degrees F")


def physical(width: int = 64, steps: int = 200) -> Subject:
    """Benign or not, from measures of cell nuclei in their own units."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    measures, labels = torch.tensor(found.data).float()[order], torch.tensor(found.target)[order]
    model = Physical(measures[:269].mean(0), measures[:269].std(0), width)

    def loss() -> torch.Tensor:
        chosen = torch.randint(0, 269, (64,))
        return F.cross_entropy(model(measures[chosen]), labels[chosen])

    _fit(model, loss, steps, 3e-3)
    parts = list(measures[269:].split(50)), list(labels[269:].split(50))
    batches: list[Batch] = [(part,) for part in parts[0]]
    return Subject(model, batches[:2], batches[2:], _accuracy(parts[1][2:], batches[2:]), "accuracy, %")


LEARNED: dict[str, Entry] = {
    "characters": Entry(characters),
    "radiance field": Entry(radiance_field),
    "ViT, massive channels": Entry(massive_channels),
    "diffusion": Entry(diffusion),
    "digits of the demo": Entry(demo_classifier),
    "restorer": Entry(restorer, ("sklearn", "PIL")),
    "forecaster": Entry(forecaster, ("vega_datasets",)),
    "physical units": Entry(physical, ("sklearn",)),
}
