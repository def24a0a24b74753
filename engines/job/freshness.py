"""Whether a stage must run again, and why."""

from __future__ import annotations

from calibcast.engines.job.manifest import Manifest
from calibcast.engines.job.openers import digest
from calibcast.engines.job.stage import Stage


def reason_to_run(manifest: Manifest, stage: Stage, redone: set[str]) -> str:
    """Why a stage must run; empty when it need not. redone: earlier stages that would run again."""
    if stage.name in manifest.stages:
        for need in stage.needs:
            if need in redone:
                return f"{need} is made again"
    return manifest.why(stage.name, inputs_of(manifest, stage), stage.settings, stage.artifacts)


def unchanged(manifest: Manifest, stage: Stage) -> str:
    return f"skipped, as nothing changed in {', '.join(inputs_of(manifest, stage))} and its settings"


def inputs_of(manifest: Manifest, stage: Stage) -> dict[str, str]:
    """All fingerprints that a stage depends on: its own inputs, and the files of the stages that it needs."""
    before = {f"the result of {need}": digest(manifest.stages[need].files) for need in stage.needs
              if need in manifest.stages}  # fmt: skip
    return {**stage.inputs, **before}
