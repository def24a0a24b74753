"""Jobs in a child process that may crash or hang: the child is started again, and one answer is lost."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any


class Worker:
    """A child that runs `command` and answers jobs, one JSON line each. A context manager: leaving ends the child.

    limit_s: seconds that a job may take.
    """

    def __init__(self, command: Sequence[str], limit_s: float = 300.0) -> None:
        self._command, self._limit = list(command), limit_s
        self._child: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the worker is left

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()
        self._log.close()

    def ask(self, job: Any) -> dict[str, Any]:
        """`{"result": ...}`; or `{"failure": why}` where the job raised, crashed the child, or took too long."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            if not ready.select(self._limit):
                self._end()
                return {"failure": f"hangs: no answer in {self._limit:g} s"}
        line = child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = child.wait()
        self._end()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"failure": f"crashes: {name}"}

    def log(self) -> str:
        """The end of what the children wrote to stderr."""
        self._log.seek(0)
        return self._log.read()[-4000:]

    def _start(self) -> subprocess.Popen[str]:
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def serve(answer: Callable[[Any], Any]) -> None:
    """In the child: answer the jobs that come, until no more do. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = {"result": answer(json.loads(line))}
        except Exception as error:
            reply = {"failure": f"fails: {type(error).__name__}: {_brief(error)}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _brief(error: Exception) -> str:
    """The last lines of a message say what was wrong, the first what was tried: the telling one, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error))[:200]
