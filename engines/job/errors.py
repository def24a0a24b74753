"""The job's own errors, apart from those that every stage raises."""

from __future__ import annotations

from calibcast.engines.usage import UsageError


class JobError(UsageError):
    """The job file is wrong, or asks for something impossible: exit code 2."""


class Stopped(BaseException):
    """A signal asked the job to stop. `code` is the exit code: 130 or 143. Not an Exception, so that a loader that
    catches everything does not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.code = 128 + signum
