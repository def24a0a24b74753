"""Find out, in a separate process, what is wrong with a range table whose checksum does not match.

Damaged bytes can crash the process that parses them, so another process reads them. The report says more than "the
checksum is wrong": which column is missing, which row contradicts itself, or that another program wrote the file.

    python -m calibcast.calib.damage_report ranges.parquet

writes a JSON text, or null when the file can be read and nothing else is wrong with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from calibcast.calib.child_process import module_search_path
from calibcast.calib.errors import ArtifactError
from calibcast.calib.range_file import read_ranges

_SECONDS = 120.0  # damaged bytes can make a reader loop for ever


def damage_report(source: Path) -> str | None:
    """Why `source` cannot be read as a range table; None when reading it shows nothing wrong."""
    # The child imports the same packages as the caller, from the same places.
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "calibcast.calib.damage_report", str(source)],
            env={**os.environ, "PYTHONPATH": module_search_path()},
            capture_output=True,  # panics of polars print a trace
            timeout=_SECONDS,
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)
            return None if found is None else str(found)
        how = f"ends with status {done.returncode}"
    except subprocess.TimeoutExpired:
        how = f"does not come back within {_SECONDS:g} s"
    except (OSError, ValueError, TypeError):  # TypeError: a Python inside another program has no executable
        return None  # no child can be started; the caller reports the wrong checksum anyway
    return f"{source} is not a readable Parquet file (truncated or foreign): a process that reads it {how}"


def main(path: str) -> None:
    """Read the file and write what is wrong to stdout, as JSON."""
    source = Path(path)
    try:
        read_ranges(source.read_bytes(), source)
    except ArtifactError as error:
        json.dump(str(error), sys.stdout)
    else:
        json.dump(None, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
