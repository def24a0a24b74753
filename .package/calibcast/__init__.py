"""Calibration-driven autocast for TensorRT: every public name of the three packages, imported when it is asked for.

`calibcast.calib` measures, `calibcast.passes` decides and rewrites, `calibcast.engines` builds and judges.
"""

from typing import TYPE_CHECKING, Any

from calibcast import calib, engines, passes

if TYPE_CHECKING:
    from calibcast.calib import *  # noqa: F403
    from calibcast.engines import *  # noqa: F403
    from calibcast.passes import *  # noqa: F403

_PACKAGES = (calib, passes, engines)

__all__ = sorted({name for package in _PACKAGES for name in package.__all__})


def __getattr__(name: str) -> Any:
    """A public name of `calib`, `passes` or `engines` (PEP 562): importing calibcast imports no torch."""
    for package in _PACKAGES:
        if name in package.__all__:
            return getattr(package, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("calibcast")
    raise AttributeError(f"module 'calibcast' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
