"""What the tests of engines share: a cache of their own, and whether a real builder is installed."""

import os

# Before anything builds: tests neither read nor fill the user's cache, also from processes that they start.
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="calibcast-test-cache-")
os.environ["CALIBCAST_CACHE"] = _CACHE.name


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("CALIBCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
