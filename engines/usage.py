"""Errors for mistakes in a request, not in its results, and the exit code of each error on the command line."""

from __future__ import annotations

from calibcast.calib.errors import ArtifactError, CalibcastError, GateError, SettingError, StorageError

# What `--backend` and `backend=` take; "auto" takes the best one that works on this machine.
BACKEND_NAMES = ("tensorrt", "inductor", "eager")


class UsageError(CalibcastError):
    """An option or argument that names nothing, or that cannot be combined with another."""


class LocationError(CalibcastError):
    """A location on the command line that names nothing."""


def exit_code(error: CalibcastError) -> int:
    """3 for a gate that said no; 2 for a mistake in the request, also a file that is not what was asked for; else 1."""
    if isinstance(error, GateError):
        return 3
    if isinstance(error, StorageError):
        return 1
    return 2 if isinstance(error, (UsageError, LocationError, SettingError, ArtifactError)) else 1
