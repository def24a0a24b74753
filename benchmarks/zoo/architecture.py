"""What an entry of the zoo is: a seeded model as its user would export it, and data as its user would have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

CALIBRATION_BATCHES = 3


@dataclass(frozen=True)
class Sample:
    """What `torch.export.export` takes: a module in eval mode, its example arguments, and which sizes may vary."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    make: builds it; called after seeding, so that the same weights come on every call.
    batch: batch number i in the form that a dataloader gives it; called after seeding with i.
    transform: from such a batch to the model's inputs, where they are not the same.
    covers: which of `coverage.ITEMS` it has.
    slow: building and exporting it takes more than a few seconds.
    """

    name: str
    family: str
    make: Callable[[], Sample]
    batch: Callable[[int], Any]
    transform: Callable[[Any], Any] | None = None
    covers: tuple[str, ...] = ()
    slow: bool = False

    def sample(self) -> Sample:
        """The model and its export arguments; the same on every call."""
        torch.manual_seed(0)
        return self.make()

    def program(self) -> ExportedProgram:
        """The exported program."""
        sample = self.sample()
        with torch.no_grad():
            return torch.export.export(
                sample.module, sample.args, dict(sample.kwargs), dynamic_shapes=sample.dynamic_shapes
            )

    def batches(self, count: int = CALIBRATION_BATCHES) -> list[Any]:
        """The first `count` batches, as a dataloader gives them."""
        return [self.batch_at(index) for index in range(count)]

    def unseen(self) -> Any:
        """A batch that `batches()` does not have."""
        return self.batch_at(CALIBRATION_BATCHES)

    def batch_at(self, index: int) -> Any:
        """Batch number `index`, the same on every call."""
        torch.manual_seed(1000 + index)
        return self.batch(index)


def settled(model: nn.Module, *inputs: Any) -> nn.Module:
    """`model` in eval mode, its batch norms holding the statistics of `inputs`, as those of a trained model would.

    Untrained statistics (0 and 1) let activations grow or die from layer to layer.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average over the passes below
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for _ in range(2 if norms else 0):
            model(*inputs)
    return model.eval()


def awakened(model: nn.Module) -> nn.Module:
    """`model` with faint weights scaled up, in place, to what keeps a signal's size: 1 / sqrt(fan in).

    Libraries start from weights of 0.02, which suits widths of 1,000; at a width of 32 the outputs would be almost
    the same for every input. Weights that start at zero get random ones.
    """
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                _raise(weight, weight[0].numel() ** -0.5)
            elif isinstance(weight, torch.Tensor) and isinstance(module, nn.Embedding):
                _raise(weight, 1.0)
    return model


def _raise(weight: torch.Tensor, wanted: float) -> None:
    deviation = float(weight.std())
    if deviation == 0.0:
        weight.normal_(0.0, wanted)
    elif deviation < wanted / 2:
        weight.mul_(wanted / deviation)
