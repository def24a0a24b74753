"""Noise at a program's outputs, channel by channel, so that a faint channel beside a loud one counts too."""

from __future__ import annotations

import torch

# The noise of a channel is divided by at least this share (-60 dB) of the mean power of its output's channels.
# Otherwise any noise in a channel that is silent in fp32 would count as infinite.
SILENT = 1e-6
# How many elements a channel needs for its power to mean something. One logit near 0 in a single row means nothing.
FEWEST = 32
# From this many channels on, some are near 0 by chance. Fewer are taken for separate quantities, each in its own unit.
POPULATION = 8
# A channel with at least this share of the median channel's variance (half its deviation) is taken to have its unit.
SAME_UNIT = 0.25
# From this many channels on, shares of one whole (the classes of a softmax) are held to the mean power at least.
MANY_SHARES = 64
# How near to 1 shares add up.
_WHOLE = 1e-3


def channel_dimension(tensor: torch.Tensor) -> int | None:
    """The dimension of an output's channels: 1 for images and volumes ([batch, channels, ..]), else the last.

    None where it counts as one channel: it has at most one dimension, or fewer than `FEWEST` elements a channel.
    """
    if tensor.ndim <= 1:
        return None
    dimension = _place_of_channels(tensor)
    return dimension if tensor.numel() >= FEWEST * tensor.shape[dimension] else None


def by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """An output as [channels, elements]; [1, elements] where channels have fewer than `FEWEST` elements."""
    return tensor.reshape(1, -1) if channel_dimension(tensor) is None else every_channel(tensor)


def every_channel(tensor: torch.Tensor) -> torch.Tensor:
    """An output as [channels, elements], however few elements there are: later batches may bring more."""
    return tensor.reshape(1, -1) if tensor.ndim <= 1 else tensor.movedim(_place_of_channels(tensor), 0).flatten(1)


def _place_of_channels(tensor: torch.Tensor) -> int:
    return 1 if tensor.ndim > 3 else tensor.ndim - 1


def channel_power(reference: torch.Tensor) -> torch.Tensor:
    """The power that each channel's noise is divided by, float64 [channels]: sums of squares of finite values.

    It is the channel's own power, or the median power of the output's channels, where that is more and the channel has
    the same unit. Of a thousand logits some are near 0 for every input of a batch; an error that is small beside the
    other logits is small there, too. A score beside boxes in pixels is compared with its own power. The variance shows
    the unit: the median power counts in full where the channel has at least `SAME_UNIT` of the median variance, and
    falls with the square of the variance below that. With fewer than `POPULATION` channels, only the own power counts.

    Many probabilities that add up to 1 are shares of one whole, and most of them are 0 all the time. A class that is
    rarer than one of average power is held to that power: else the class that has a tenth of one frame decides for all.

    It is at least `SILENT` of the mean power, and 0 only where the whole output is 0.
    """
    values = by_channel(reference).double()
    values = torch.where(values.isfinite(), values, 0.0)
    power = values.square().sum(1)
    if len(power) >= POPULATION:
        varied = (values - values.mean(1, keepdim=True)).square().sum(1)
        alike = (varied / (SAME_UNIT * varied.median())).nan_to_num(0.0, 0.0, 0.0).clamp(max=1).square()
        power = torch.maximum(power, alike * power.median())
    least = SILENT if len(power) < MANY_SHARES else torch.where(_are_shares(values), 1.0, SILENT)
    return torch.maximum(power, least * power.mean())


def _are_shares(values: torch.Tensor) -> torch.Tensor:
    """Whether [channels, elements] are numbers from 0 on that add up to 1 over the channels, as a 0-d tensor."""
    whole = (values.sum(0) - 1).abs() < _WHOLE
    return (values >= 0).all() & whole.all()


def channel_noise(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Noise-to-signal power of each channel of one output, float64 [channels].

    inf where an element is finite in `reference` but not in `ours`, and where there is noise in an output that is all
    0. Elements that are not finite in `reference` are left out. For integers and booleans: the share that differs, [1].
    """
    if not (reference.is_floating_point() or reference.is_complex()):
        differ = (ours != reference).double()
        return differ.mean().reshape(1) if differ.numel() else differ.new_zeros(1)
    error = by_channel(torch.where(reference.isfinite(), ours - reference, 0.0)).abs().double()
    power = channel_power(reference.abs())
    noise = error.square().sum(1)
    ratio = torch.where(noise != 0, noise / power, 0.0)  # NaN, too, is noise
    return torch.where(ratio.isnan(), torch.inf, ratio)
