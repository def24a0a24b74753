"""The interface that every backend implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import torch
from calibcast.calib.ranges import RangeTable
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram


class Runtime(Protocol):
    """A built program that can run. Call it like the model; tensors that are not on `device` are moved there."""

    device: torch.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def reset(self) -> None:
        """Restore the start of the state that the program keeps between calls (the buffers that it writes to)."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `Backend.load` needs, including the present state. The engine itself saves the program."""
        ...


@dataclass(frozen=True)
class BuildRequest:
    """What to build, and how. The names are those of `engines.build`, where each is explained."""

    program: ExportedProgram
    plan: PrecisionPlan | None = None
    ranges: RangeTable | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ahead_of_time: bool = False
    on_failure: str = "error"
    isolate: bool = True
    build_timeout: float | None = 1800.0
    cache: bool | str | Path = True
    cache_size: int = 10 << 30
    progress: bool = True
    reference: ExportedProgram | None = None
    batches: Sequence[Sequence[Any]] = ()  # flat inputs
    carry_state: bool = False


@dataclass(frozen=True)
class Built:
    """The result of a build. program, plan: what was built, which `on_failure` may have changed. ledger: as in
    `engines.ledger.ledger`. record: what the manifest says about the build."""

    runtime: Runtime
    program: ExportedProgram
    plan: PrecisionPlan | None
    ledger: pl.DataFrame
    record: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """Builds and loads runtimes. `name` is its name in `build(backend=...)`."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, and what to do; None when it can."""
        ...

    def require(self, ahead_of_time: bool) -> None:
        """Raise BuildError unless this backend can build here."""
        ...

    def check_settings(self, settings: Mapping[str, Any], ahead_of_time: bool) -> None:
        """Raise BuildError for settings that this backend does not have, as far as that is known before a build."""
        ...

    def build(self, request: BuildRequest) -> Built:
        """Build a program in the types that its graph states. Raises BuildError, as the two methods above do."""
        ...

    def load(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> Runtime:
        """Read back what `Runtime.save` wrote. Raises ArtifactError, MismatchError or BuildError."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of packages and facts of the machine that a runtime depends on, for the manifest."""
        ...
