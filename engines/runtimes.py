"""The small interface behind which backends stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch.export import ExportedProgram

from calib.ranges import RangeTable


class Runtime(Protocol):
    """Something built that runs. Called like the model; tensors must be on `device`, or are moved there."""

    device: torch.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def save(self, folder: Path) -> None:
        """Write what `Backend.load` needs beside the program, which the engine saves itself."""
        ...


class Backend(Protocol):
    """Builds and loads runtimes. `name` is what `build(backend=...)` is given."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run here, and what to do; None when it can."""
        ...

    def build(self, program: ExportedProgram, ranges: RangeTable | None, settings: dict[str, Any]) -> Runtime:
        """Build `program` in the types that its graph spells out. Raises BuildError."""
        ...

    def load(self, folder: Path, program: ExportedProgram) -> Runtime:
        """Read back what `Runtime.save` wrote. Raises ArtifactError or BuildError."""
        ...

    def versions(self) -> dict[str, str]:
        """What the runtime was built with, for the manifest."""
        ...
