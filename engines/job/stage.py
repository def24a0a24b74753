"""A stage of a job, and its settings in the form in which they are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage. needs: stages whose files it reads. inputs: fingerprints of what else it is made of. settings: of
    the job file, by key. work: does it, and returns what the manifest should say of it. judge: raises GateError when
    a gate of the user's says no to that; asked again when the stage is skipped. restate: where a gate is another than
    the one that the stage's files tell of, rewrites them, and returns what changes in the manifest."""

    name: str
    artifacts: tuple[str, ...]
    needs: tuple[str, ...]
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    work: Callable[[], dict[str, Any]]
    judge: Callable[[Mapping[str, Any]], None] = lambda result: None
    restate: Callable[[], dict[str, Any]] = dict


def plain_settings(table: Any, *names: str) -> dict[str, Any]:
    """Settings as JSON gives them back, so that they can be compared; inf stays inf."""
    found = table.model_dump(include=set(names)) if names else table.model_dump()
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
