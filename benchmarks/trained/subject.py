"""What the benchmark of trained networks needs of each: the network, real data of two kinds, and what it is for."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

Batch = tuple[torch.Tensor, ...]
# The network, or a cast of it: takes its inputs, gives its outputs in order.
Run = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Subject:
    """A trained network in eval mode, on a CPU.

    calibration, held_out: batches of positional inputs, all of one size, of different data. metric: the task's own
    number for whatever runs the network, called `metric_name`; it looks at held-out data only.
    """

    model: nn.Module
    calibration: list[Batch]
    held_out: list[Batch]
    metric: Callable[[Run], float]
    metric_name: str


@dataclass(frozen=True)
class Entry:
    """How a network is made, and the packages that its weights or its data lie in (import names)."""

    make: Callable[[], Subject]
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of its packages that are not installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    def subject(self) -> Subject:
        """The same on every call: the seed is fixed, and training takes place here."""
        torch.manual_seed(0)
        with torch.enable_grad():
            made = self.make()
        made.model.eval().requires_grad_(False)
        return made


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported, as many need more than their weights do."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package named {package!r} is installed")
    return Path(next(iter(spec.submodule_search_locations)))


def part_of(package: str, module: str, **attributes: Any) -> ModuleType:
    """A module of a package, without what the package itself imports: audio backends, plotting, downloads.

    attributes: names that the module looks up in its package.
    """
    for name in (package, *(f"{package}.{part}" for part in module.split(".")[:-1])):
        if name not in sys.modules:
            places = [str(folder_of(package).joinpath(*name.split(".")[1:]))]
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = places
            sys.modules[name] = importlib.util.module_from_spec(spec)
    for name, value in attributes.items():
        setattr(sys.modules[package], name, value)
    return importlib.import_module(f"{package}.{module}")


def results_of(model: nn.Module, batches: Sequence[Batch], output: int = 0) -> list[torch.Tensor]:
    """What the network gives, for metrics that ask how far a cast of it is from it."""
    model.eval()
    with torch.no_grad():
        results = [model(*batch) for batch in batches]
    return [result if isinstance(result, torch.Tensor) else result[output] for result in results]
