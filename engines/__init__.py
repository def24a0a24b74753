"""Build an engine from a graph with casts, and judge it. The command line is on top of this package."""

from typing import TYPE_CHECKING

from calibcast.calib.lazy_names import lazy_names

if TYPE_CHECKING:
    from calibcast.engines.building import build
    from calibcast.engines.compilation import compile
    from calibcast.engines.engine import Engine
    from calibcast.engines.judging.report import VerificationReport
    from calibcast.engines.judging.verification import verify
    from calibcast.engines.monitoring.monitor import Monitor
    from calibcast.engines.monitoring.report import MonitorReport
    from calibcast.engines.onnx_export.exporting import export_onnx
    from calibcast.engines.review.report_table import report_frame

__all__ = [
    "Engine",
    "Monitor",
    "MonitorReport",
    "VerificationReport",
    "build",
    "compile",
    "export_onnx",
    "report_frame",
    "verify",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Engine": "calibcast.engines.engine",
        "Monitor": "calibcast.engines.monitoring.monitor",
        "MonitorReport": "calibcast.engines.monitoring.report",
        "VerificationReport": "calibcast.engines.judging.report",
        "build": "calibcast.engines.building",
        "compile": "calibcast.engines.compilation",
        "export_onnx": "calibcast.engines.onnx_export.exporting",
        "report_frame": "calibcast.engines.review.report_table",
        "verify": "calibcast.engines.judging.verification",
    },
)
