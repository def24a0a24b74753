"""Error per channel, against the channel's own power and its own variation.

A temperature of 285 K with an error of 1 K has 49 dB, but most of that is the offset: the error is a tenth of the 10 K
by which it varies. And in a sum over all channels, a faint channel does not count beside a loud one.
"""

from __future__ import annotations

import math

import torch
from calibcast.calib.output_noise import FEWEST, SILENT, every_channel


class ChannelErrors:
    """Streamed float64 sums, a few per channel: dimension 1 of images and volumes, else the last.

    The output counts as one channel where the number of channels changes from batch to batch, or where all batches
    together have fewer than `FEWEST` elements in each.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # [5, channels]: see `_summed`
        self._center: torch.Tensor | None = None  # [channels, 1]: near the mean, so that squares lose no digits
        self._whole = False

    def update(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add one batch of a real output; elements that are not finite in both are left out."""
        if not theirs.numel():
            return
        ours, theirs = (every_channel(t.detach()).double() for t in (ours, theirs))
        if self._sums is not None and not self._whole and len(theirs) != self._sums.shape[1]:
            self._merge()
        if self._whole:
            ours, theirs = ours.reshape(1, -1), theirs.reshape(1, -1)
        finite = ours.isfinite() & theirs.isfinite()
        counts = finite.sum(1)
        if self._center is None:
            self._center = torch.where(finite, theirs, 0.0).sum(1, keepdim=True) / counts.clamp(min=1)[:, None]
        sums = _summed(ours, theirs, finite, self._center)
        self._sums = sums if self._sums is None else self._sums + sums

    def _merge(self) -> None:
        """Go on with one channel, centred on 0."""
        self._sums, self._whole = self._merged(), True
        self._center = torch.zeros_like(self._sums[:1])

    def _merged(self) -> torch.Tensor:
        """The sums of all channels, [5, 1], about 0."""
        assert self._sums is not None
        assert self._center is not None
        count, total, squares, error, power = self._sums
        center = self._center[:, 0]
        plain = (count, total + count * center, squares + 2 * center * total + count * center**2, error, power)
        return torch.stack(plain).sum(1, keepdim=True)

    def _settled(self) -> torch.Tensor:
        """The sums to judge by: of each channel, or of all together where they have few elements. [5, 0] before any
        batch."""
        if self._sums is None:
            return torch.zeros(5, 0)
        few = self._sums.shape[1] > 1 and float(self._sums[0].sum()) < FEWEST * self._sums.shape[1]
        return self._merged() if few else self._sums

    @property
    def variation_db(self) -> float:
        """10 log10 of the variation, each channel about its own mean, to the error; NaN where both are 0."""
        variation, error = self._variation_and_error()
        return _decibels(variation.sum(), error.sum())

    @property
    def worst_variation(self) -> tuple[float, int | None]:
        """The least of the channels' own ratios of variation to error, dB, and the channel."""
        return _worst(*self._variation_and_error())

    @property
    def worst_channel(self) -> tuple[float, int | None]:
        """The least of the channels' own ratios of power to error, dB, and the channel."""
        sums = self._settled()
        return _worst(sums[4], sums[3])

    def _variation_and_error(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of squares of each channel."""
        count, total, squares, error, _ = self._settled()
        return (squares - total**2 / count.clamp(min=1)).clamp(min=0), error


def _summed(ours: torch.Tensor, theirs: torch.Tensor, finite: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """[5, channels]: the count, the sums of the centred reference and of its square, of the error's and its square."""
    centred = torch.where(finite, theirs - center, 0.0)
    error = torch.where(finite, ours - theirs, 0.0)
    power = torch.where(finite, theirs, 0.0)
    parts = (finite.double(), centred, centred.square(), error.square(), power.square())
    return torch.stack([part.sum(1) for part in parts])


def _worst(signal: torch.Tensor, error: torch.Tensor) -> tuple[float, int | None]:
    """The least ratio, dB, and its channel. A signal more than 60 dB below the mean of all counts as 60 dB below."""
    if not len(signal):
        return math.nan, None
    ratios = error / torch.maximum(signal, SILENT * signal.mean())
    ratios = torch.where(error == 0, 0.0, ratios)
    channel = int(ratios.argmax())
    ratio = float(ratios[channel])
    return (math.inf if ratio == 0 else -10 * math.log10(ratio) if math.isfinite(ratio) else -math.inf), channel


def _decibels(signal: torch.Tensor, error: torch.Tensor) -> float:
    if float(error) == 0:
        return math.inf if float(signal) else math.nan
    return 10 * math.log10(float(signal) / float(error)) if float(signal) else -math.inf
