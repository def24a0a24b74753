"""A pytest plugin: which test runs which line, and how long each takes.

Coverage's context is the test and its phase, `file::test|call` or `|setup`: what a fixture of a module runs is recorded
with the test that needed it first, and belongs to all tests of that file.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import coverage
import pytest


class Contexts:
    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured, self.seconds = measured, dict[str, float]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: Any) -> Generator[None]:
        self.measured.switch_context(f"{item.nodeid}|setup")
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None]:
        self.measured.switch_context(f"{item.nodeid}|call")
        return (yield)
