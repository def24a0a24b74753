"""Noise at a program's outputs, channel by channel, so that a faint channel beside a loud one counts too."""

from __future__ import annotations

import torch

# A channel is held to no less power than 60 dB below the mean of its output's channels: one that is silent in fp32 as
# well would make any noise infinite.
SILENT = 1e-6
# Elements of a channel that say what its power is. Of a single row of logits, one that is near 0 says nothing.
FEWEST = 32
# So many channels are a population, in which some are near 0 by chance. Fewer are quantities, each in its own unit.
POPULATION = 8
# One that varies by half as much as its output's typical channel, or more, is in the unit of that.
SAME_UNIT = 0.25


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
    """The power that each channel's noise is held to, float64 [channels]: sums of squares of finite values.

    That is the channel's own, or what a typical channel of its output has, if that is more and the channel is in the
    same unit. Of a thousand logits some are near 0 for each input of a batch, and an error that is none beside the
    others is none there; a score beside boxes in pixels is held to its own power. What a channel varies by says what
    unit it is in: the typical power counts in full where it varies by `SAME_UNIT` of the typical variance, and by less
    as it varies less (by the square). Outputs of fewer than `POPULATION` channels have no typical one.

    At least `SILENT` of the mean; 0 only where the whole output is.
    """
    values = by_channel(reference).double()
    values = torch.where(values.isfinite(), values, 0.0)
    power = values.square().sum(1)
    if len(power) >= POPULATION:
        varied = (values - values.mean(1, keepdim=True)).square().sum(1)
        alike = (varied / (SAME_UNIT * varied.median())).nan_to_num(0.0, 0.0, 0.0).clamp(max=1).square()
        power = torch.maximum(power, alike * power.median())
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
