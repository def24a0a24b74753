"""The command line: thin layers over the Python calls, reading files and writing files.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 2 a bad command line or job file; 3 a gate
that the user set said no; 130 and 143 for signals; 1 everything else.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from typing import Any

import typer
from calibcast.calib.errors import CalibcastError, GateError, SettingError
from calibcast.engines.commands import diagnosis, engine, export, job, review, stages
from calibcast.engines.commands.options import note
from calibcast.engines.job.errors import JobError
from calibcast.engines.usage import LocationError, UsageError

app = typer.Typer(
    name="calibcast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibration-driven autocast for Torch-TensorRT: your data decides which nodes stay in fp32.\n\n"
    "The stages: calibrate MODEL on data, plan from the ranges, build an engine, verify it on other data. "
    "MODEL is a .pt2 file, or file.py:function that returns an ExportedProgram or (module, args[, kwargs[, "
    "dynamic_shapes]]). Data is file.py:function that returns a dataloader. Start with: calibcast demo",
)

# In the order in which `calibcast --help` lists them.
for command in (
    stages.calibrate,
    stages.plan,
    diagnosis.diagnose,
    engine.build,
    engine.inspect,
    export.export,
    stages.verify,
    review.report,
    review.what_if,
    review.diff,
    job.merge,
    job.init,
    job.run,
    stages.demo,
):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `calibcast`: every error as one message and an exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    # Of torch and its serialisers, on loading files; nothing that a user could act on.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        outcome = app(arguments, standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        return 130
    except CalibcastError as error:
        note(str(error) if isinstance(error, GateError) else f"error: {error}")
        return _EXIT_CODES.get(type(error), 1)
    except Exception as error:
        # Click's usage errors know how to show themselves; typer does not export their base.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return int(error.exit_code)


_EXIT_CODES: dict[type[Exception], int] = {LocationError: 2, UsageError: 2, JobError: 2, SettingError: 2, GateError: 3}


def _terminated(*_: Any) -> None:
    note("terminated")
    sys.exit(143)


if __name__ == "__main__":
    main()
