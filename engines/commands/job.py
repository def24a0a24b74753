"""Commands of the offline job: write a first job file, run it, and merge what several runs measured."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from calibcast.calib.errors import CalibcastError
from calibcast.calib.file_kinds import RANGES_OR_CHECKPOINT
from calibcast.calib.printable import printable_lines
from calibcast.engines.commands.options import check_file, check_writable_folder, existing, say
from calibcast.engines.streams import fitted
from calibcast.engines.usage import LocationError, exit_code

PARTS = existing("a ranges file written by calibcast calibrate, or a job's checkpoint", RANGES_OR_CHECKPOINT)


def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="where to write; made when missing")] = Path("."),
) -> None:
    """Write a commented job file that runs, with a model, data and a metric to replace by your own.

    Example: calibcast init night && calibcast run night/job.toml
    """
    from calibcast.engines.job.template import write_template

    check_writable_folder(folder)
    for path in write_template(folder):
        say(f"wrote {path}")
    say(f"next: calibcast run {folder / 'job.toml'} --dry-run")


def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="a job file; calibcast init writes one")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and write nothing")] = False,
    log_format: Annotated[
        str, typer.Option(metavar="text|json", help="of what is said on stderr; json: one object a line")
    ] = "text",
    redo: Annotated[bool, typer.Option("--redo", help="make everything again, also what is up to date")] = False,
) -> None:
    """Run a calibration job: every stage that is not up to date. After a kill, the same command continues from the
    checkpoint.

    Under torchrun the processes share the calibration. Example: calibcast run job.toml --log-format json
    """
    from calibcast.engines.early_builder import fork_builder
    from calibcast.engines.job.errors import Stopped
    from calibcast.engines.job.folder import MANIFEST, JobFolder
    from calibcast.engines.job.job_file import load_jobs
    from calibcast.engines.job.logs import FORMATS, logging_to_stderr, tell
    from calibcast.engines.job.ranks import Ranks

    if log_format not in FORMATS:
        raise LocationError(f"--log-format {log_format!r}: known are {' and '.join(FORMATS)}")
    ranks, results = Ranks.here(), sys.stdout

    def say(line: str) -> None:
        typer.echo(fitted(printable_lines(line), results), file=results)

    with logging_to_stderr(log_format, ranks.rank, ranks.world):
        try:
            files = load_jobs(job)  # a mistake in it is told before torch is imported, which takes seconds
            if ranks.first and not dry_run:  # one builder serves all models
                asked, folder = files[0].job.build, JobFolder.of(files[0]).path
                isolate = bool(asked.settings.get("isolate", True))
                sure = redo or not (folder / MANIFEST).exists()
                fork_builder(asked.backend, asked.ahead_of_time, isolate, sure)
            from calibcast.engines.job.dry_run import plan_job
            from calibcast.engines.job.running import run_job

            if dry_run and ranks.first:
                plan_job(job, say)
            elif not dry_run:
                run_job(job, say, bar=log_format == "text", redo=redo)
        except CalibcastError as error:
            code = exit_code(error)
            tell(str(error), 40, event="error", kind=type(error).__name__, exit_code=code)
            raise typer.Exit(code) from error
        except Stopped as stop:
            name = "interrupted" if stop.code == 130 else "terminated"
            tell(f"{name}: the same command goes on from here", 40, event="stopped", exit_code=stop.code)
            raise typer.Exit(stop.code) from stop
        except Exception as error:
            if log_format != "json":
                raise
            text = f"{type(error).__name__}: {error}"
            tell(text, 40, event="error", kind=type(error).__name__, exit_code=1, traceback=traceback.format_exc())
            raise typer.Exit(1) from error


def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(metavar="A B ..", help="range tables (.parquet) or checkpoints of a job (.npz)", callback=PARTS),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="the range table to write, Parquet")],
) -> None:
    """Merge what several runs, days or processes measured on one program into one range table.

    Example: calibcast merge monday.parquet tuesday.parquet -o ranges.parquet
    """
    check_file(output)
    from calibcast.engines.job.merging import merge_files

    table = merge_files(parts)
    table.save(output)
    say(f"{table}\nwrote {output}")
