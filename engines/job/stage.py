"""A stage of a job, and its settings in the form that the manifest compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage. needs: stages whose files it reads. inputs: fingerprints of everything else that it depends on.
    settings: those of the job file, by key. work: does the stage, and returns its result for the manifest. judge:
    raises GateError when a gate of the user refuses that result; also called when the stage is skipped. restate: where
    a gate differs from the one recorded in the stage's files, rewrites them, and returns what changes in the
    manifest."""

    name: str
    artifacts: tuple[str, ...]
    needs: tuple[str, ...]
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    work: Callable[[], dict[str, Any]]
    judge: Callable[[Mapping[str, Any]], None] = lambda result: None
    restate: Callable[[], dict[str, Any]] = dict


def plain_settings(table: Any, *names: str) -> dict[str, Any]:
    """Settings as they come back from JSON, so that they can be compared with a manifest's; inf stays inf."""
    found = table.model_dump(include=set(names)) if names else table.model_dump()
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
