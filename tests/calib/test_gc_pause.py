"""The collector of cycles is out of the way for a while, and then as it was."""

from __future__ import annotations

import gc

import pytest
from calibcast.calib.gc_pause import paused


def test_it_is_off_inside_and_on_afterwards() -> None:
    """Nested too: the outermost switches it on again."""
    assert gc.isenabled()
    with paused():
        with paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_leaves_it_on() -> None:
    with pytest.raises(ValueError, match="inside"), paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_what_a_caller_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
