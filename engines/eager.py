"""The eager backend: runs the cast graph in PyTorch, unchanged. Works on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from calibcast.calib.batches import Signature, signature_of
from calibcast.calib.errors import ArtifactError, BatchError, BuildError
from calibcast.calib.execution import NodeError, ProgramRunner, output_structure
from calibcast.calib.tensor_files import load_tensors, save_tensors
from calibcast.engines.ledger.ledger import eager_ledger, plan_of
from calibcast.engines.runtimes import BuildRequest, Built
from torch.export import ExportedProgram

_STATE = "state_now.safetensors"


class EagerRuntime:
    """Runs a program node by node. Where the CPU lacks a half-precision kernel, the result is computed in fp32 and
    rounded, so that a check here shows what a GPU would do."""

    def __init__(self, program: ExportedProgram, device: torch.device | str | None = None) -> None:
        self._program = program
        self._runner = ProgramRunner(program, device, carry_state=True)
        self._signature: Signature = signature_of(program)
        self.device = self._runner.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._signature.flatten_call(args, kwargs)
        try:
            results = self._runner.run(self._runner.to_device(flat))
        except NodeError as error:
            raise BatchError(str(error)) from error.__cause__
        return output_structure(self._program, results)

    def reset(self) -> None:
        self._runner.reset()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from saved state. Raises ArtifactError for the state of another program."""
        held = {spec.arg.name for spec in self._program.graph_signature.input_specs}
        if unknown := state.keys() - held:
            raise ArtifactError(f"the saved state has {', '.join(sorted(unknown))}, which the program does not have")
        self._runner.restore({name: value.to(self.device) for name, value in state.items()})

    def save(self, folder: Path) -> None:
        """Write the present state, if there is any. The runtime needs nothing else beside the program."""
        if self._runner.state:
            save_tensors(folder / _STATE, self._runner.state)


class EagerBackend:
    """Builds `EagerRuntime`s."""

    name = "eager"

    def unavailable(self) -> str | None:
        return None

    def require(self, ahead_of_time: bool) -> None:
        if ahead_of_time:
            raise BuildError("backend='eager' has nothing to build ahead of time; use backend='tensorrt'")

    def check_settings(self, settings: Mapping[str, Any], ahead_of_time: bool) -> None:
        if unknown := sorted(set(settings) - {"device"}):
            raise BuildError(f"backend='eager' takes no setting but device; got {', '.join(unknown)}")

    def build(self, request: BuildRequest) -> Built:
        self.require(request.ahead_of_time)
        self.check_settings(request.settings, request.ahead_of_time)
        device = request.settings.get("device")
        ledger = eager_ledger(plan_of(request.plan, request.program), request.program)
        return Built(EagerRuntime(request.program, device), request.program, request.plan, ledger)

    def load(self, folder: Path, program: ExportedProgram, manifest: Mapping[str, Any]) -> EagerRuntime:
        runtime = EagerRuntime(program)
        if (folder / _STATE).is_file():
            runtime.restore(load_tensors(folder / _STATE))
        return runtime

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}
