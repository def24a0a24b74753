"""One thread per worker: two workers with two threads each on two cores wait for each other more than they compute.

And what fails is said when it fails, not when the last test has run.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start


class SaidAtOnce:
    """Prints a line for each test that fails, and for each file that cannot be read."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say(report.nodeid, report.when or "", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(report.nodeid, "collection", report)

    def _say(self, nodeid: str, when: str, report: Any) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message if crash else str(report.longrepr or "")).strip().partition("\n")[0]
        if terminal is not None:
            terminal.line("")  # after the letters of tests that have passed
            terminal.write_line(f"FAILED {nodeid} ({when}): {said}"[:300], red=True)
            terminal.flush()  # into a pipe, such as a log of CI's, it would wait for more


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers have no terminal; they send their reports
        config.pluginmanager.register(SaidAtOnce(config), "said-at-once")
