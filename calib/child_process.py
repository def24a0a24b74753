"""The import path of a child process: the path of this process, and calibcast's own folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import calibcast

# The folder that holds the package `calibcast`. Links are not resolved: in a checkout, the packages in it are links.
PACKAGE_ROOT = Path(str(calibcast.__file__)).absolute().parents[1]


def module_search_path(root: Path = PACKAGE_ROOT) -> str:
    """`PYTHONPATH` for a child that imports what this process can import, and from the same places."""
    places = [part or os.getcwd() for part in sys.path]
    return os.pathsep.join(places if str(root) in places else [str(root), *places])
