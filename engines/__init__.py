"""Build and judge: a graph with casts to an engine to a verdict. The command line stands on top."""

from typing import TYPE_CHECKING

from calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from engines.building import build
    from engines.compilation import compile
    from engines.engine import Engine
    from engines.report_table import report_frame
    from engines.verification import VerificationReport, verify

__all__ = ["Engine", "VerificationReport", "build", "compile", "report_frame", "verify"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Engine": "engines.engine",
        "VerificationReport": "engines.verification",
        "build": "engines.building",
        "compile": "engines.compilation",
        "report_frame": "engines.report_table",
        "verify": "engines.verification",
    },
)
