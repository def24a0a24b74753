"""Build and judge: a graph with casts to an engine to a verdict. The command line stands on top."""

from engines.building import build
from engines.compilation import compile
from engines.engine import Engine
from engines.report_table import report_frame
from engines.verification import VerificationReport, verify

__all__ = ["Engine", "VerificationReport", "build", "compile", "report_frame", "verify"]
