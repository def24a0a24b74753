"""The range report as one self-contained HTML page."""

from calibcast.engines.html_report.page import html_report

__all__ = ["html_report"]
