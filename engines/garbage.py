"""How often Python looks for garbage in a command, whose start makes a million objects and no garbage.

Looking through them again and again took 0.7 of 3.8 s of CPU up to the first `torch.export`, and once more at the end
1.0 s (torch 2.14, Python 3.11).
"""

from __future__ import annotations

import atexit
import gc

_USUAL = gc.get_threshold()
_RARE = (100_000, 50, 1000)


def rare() -> None:
    """Look for garbage rarely until `usual()`, and not at all when the process ends. For a command's own process."""
    gc.set_threshold(*_RARE)
    atexit.register(gc.freeze)


def usual() -> None:
    """After `rare()`: look for garbage as often as usual, but not among what is there now. Else nothing changes."""
    if gc.get_threshold() == _RARE:
        gc.freeze()
        gc.set_threshold(*_USUAL)
