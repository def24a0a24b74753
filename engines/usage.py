"""Errors for mistakes in a request, not in its results: exit code 2 on the command line."""

from __future__ import annotations

from calibcast.calib.errors import CalibcastError


class UsageError(CalibcastError):
    """An option or argument that names nothing, or that cannot be combined with another."""


class LocationError(CalibcastError):
    """A location on the command line that names nothing."""
