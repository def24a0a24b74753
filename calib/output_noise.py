"""Noise at a program's outputs, each channel held to its own power."""

from __future__ import annotations

import torch

# A channel is held to no less power than 60 dB below the mean of its output's channels: one that is silent in fp32 as
# well would make any noise infinite.
SILENT = 1e-6
# Elements of a channel that say what its power is. Of a single row of logits, one that is near 0 says nothing.
FEWEST = 32


def channel_dimension(tensor: torch.Tensor) -> int | None:
    """Where an output's channels lie: 1 of images and volumes ([batch, channels, ..]), else the last.

    None where all of it is one channel: it has at most one dimension, or fewer than `FEWEST` elements in each channel.
    """
    if tensor.ndim <= 1:
        return None
    dimension = _place_of_channels(tensor)
    return dimension if tensor.numel() >= FEWEST * tensor.shape[dimension] else None


def by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """An output as [channels, elements]; [1, elements] where channels have too few to say what their power is."""
    return tensor.reshape(1, -1) if channel_dimension(tensor) is None else every_channel(tensor)


def every_channel(tensor: torch.Tensor) -> torch.Tensor:
    """An output as [channels, elements], however few elements there are: later batches may bring more."""
    return tensor.reshape(1, -1) if tensor.ndim <= 1 else tensor.movedim(_place_of_channels(tensor), 0).flatten(1)


def _place_of_channels(tensor: torch.Tensor) -> int:
    return 1 if tensor.ndim > 3 else tensor.ndim - 1


def channel_power(reference: torch.Tensor) -> torch.Tensor:
    """The power that each channel's noise is held to, float64 [channels]: sums of squares of finite values, floored.

    0 only where the whole output is.
    """
    values = by_channel(reference).double()
    power = torch.where(values.isfinite(), values, 0.0).square().sum(1)
    return torch.maximum(power, SILENT * power.mean())


def channel_noise(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Noise-to-signal power of each channel of one output, float64 [channels].

    inf where something is not finite that is finite in `reference`, and where noise meets an output that is all 0. What
    is not finite in `reference` is left out. Of integers and booleans, the share of elements that differ, [1].
    """
    if not (reference.is_floating_point() or reference.is_complex()):
        differ = (ours != reference).double()
        return differ.mean().reshape(1) if differ.numel() else differ.new_zeros(1)
    error = by_channel(torch.where(reference.isfinite(), ours - reference, 0.0)).abs().double()
    power = channel_power(reference.abs())
    noise = error.square().sum(1)
    ratio = torch.where(noise != 0, noise / power, 0.0)  # NaN, too, is noise
    return torch.where(ratio.isnan(), torch.inf, ratio)
