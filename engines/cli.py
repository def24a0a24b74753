"""The command line: thin layers over the Python calls, which read and write files.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 2 a bad command line or job file, also
a file in it that is not what it should be; 3 a gate that the user set refuses the result; 130 and 143 for signals; 1
everything else.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Annotated, Any

import typer
from calibcast.calib.errors import CalibcastError
from calibcast.calib.printable import printable_lines
from calibcast.engines import garbage
from calibcast.engines.commands import diagnosis, diff, engine, export, job, rescaling, review, stages
from calibcast.engines.commands.options import fail, in_flags, note, say
from calibcast.engines.streams import fitted, give_up, open_streams
from calibcast.engines.usage import exit_code

_HELP = (
    "Calibration-driven autocast for Torch-TensorRT: your data decides which nodes stay in fp32.\n\n"
    "The stages: calibrate MODEL on data, plan from the ranges, build an engine, verify it on other data. "
    "MODEL is a .pt2 file, or file.py:function that returns an ExportedProgram or (module, args[, kwargs[, "
    "dynamic_shapes]]). Data is file.py:function that returns a dataloader. Start with: calibcast demo"
)
_LONGEST = 200
# What is wrong with the machine, not with the command line.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
app = typer.Typer(
    name="calibcast",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _summary(command: Callable[..., Any]) -> str:
    """The whole first sentence of a command's docstring: click would shorten it."""
    return str(command.__doc__).split("\n")[0].split(". ")[0].rstrip(".")


# In the order in which `calibcast --help` lists them.
for command in (
    stages.calibrate,
    stages.plan,
    rescaling.rescale,
    diagnosis.diagnose,
    engine.build,
    engine.inspect,
    export.export,
    stages.verify,
    review.report,
    review.what_if,
    diff.diff,
    job.merge,
    job.init,
    job.run,
    stages.demo,
):
    app.command(short_help=_summary(command))(command)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"calibcast {metadata.version('calibcast')}")
        raise typer.Exit()


@app.callback(help=_HELP)
def calibcast(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="show the version and stop")
    ] = False,
) -> None:
    """Holds only what all commands share."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `calibcast`: reports every error as one message and an exit code."""
    if arguments is None:
        garbage.rare()
    open_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneStyle("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    # Warnings of torch and its serialisers when they load files: a user can do nothing about them.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_flushed(_run(arguments)))


def _run(arguments: list[str] | None) -> int:
    try:
        outcome = _command()(arguments, standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        note("interrupted")
        return 130
    except CalibcastError as error:
        fail(in_flags(str(error), _flags()))
        return exit_code(error)
    except OSError as error:
        return _unwritten(error) if error.filename is None else _unreachable(error)
    except Exception as error:
        # Click's usage errors; typer does not export their base class.
        if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "calibcast")
        if type(error).__name__ == "NoArgsIsHelpError":  # no command at all: its message is the help
            note(error.format_message())
        else:
            fail(f"{error.format_message()} See: {command} --help")
        return int(error.exit_code)


@cache
def _command() -> Any:
    """The command line as click sees it; typer would make it anew for every call."""
    return typer.main.get_command(app)


def _flags() -> dict[str, str]:
    """Name -> flag of each parameter of all commands. A switch such as `--no-cache` has the name `no_cache`."""
    found: dict[str, str] = {}
    for made in _command().commands.values():
        for parameter in made.params:
            flags = [flag for flag in parameter.opts if flag.startswith("--")]
            if flags:
                found[parameter.name] = flags[0]
    return found


def _flushed(code: int) -> int:
    """Write what is still buffered. A full device gives an error of one line, not a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return _unwritten(error) or code
    return code


def _unwritten(error: OSError) -> int:
    give_up(sys.stdout)
    if isinstance(error, BrokenPipeError):  # the reader of the pipe has read enough, as `head` does
        return 0
    fail(f"the output cannot be written: {error.strerror or error}")
    return 1


def _unreachable(error: OSError) -> int:
    """A path of the command line that the system refuses: it is too long, leads in a circle, or may not be read."""
    name = str(error.filename)
    fail(f"{name if len(name) <= _LONGEST else f'{name[:_LONGEST]}..'}: {error.strerror or error}")
    return 1 if error.errno in _FULL else 2


class _OneStyle(logging.Formatter):
    """`warning: ` and the message, as Python's warnings are shown. Names of modules may contain control characters of a
    terminal, which are removed."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(printable_lines(f"{record.levelname.lower()}: {super().format(record)}"), sys.stderr)


def _terminated(*_: Any) -> None:
    note("terminated")
    sys.exit(143)


if __name__ == "__main__":
    main()
