"""Saves a program, a table and an engine, each onto a disk that is full after so many bytes; says what came of it.

A script, as torch's writer ends the whole process when its stream raises. The limit is the kernel's, on the size of a
file: to a program it is what a full disk is.
"""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
from calibcast.calib import ArtifactError, calibrate
from calibcast.calib.artifacts import save_program
from calibcast.engines import build
from torch import nn


def main(limit: int) -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval(), (torch.ones(2, 64),))
    table = calibrate(program, [torch.randn(2, 64)], progress=False)
    engine = build(program, ranges=table, backend="eager")
    things = {
        "a.pt2": lambda path: save_program(program, path),
        "a.parquet": table.save,
        "engine": engine.save,
    }
    with tempfile.TemporaryDirectory() as folder:
        # Fails as the disk does, and not with a signal.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for name, save in things.items():
            try:
                save(Path(folder) / name)
                print(name, "saved")
            except ArtifactError as error:
                print(name, "refused" if "cannot write" in str(error) else error)
        left = {path.name for path in Path(folder).iterdir()}
        print("left", *sorted(left))


if __name__ == "__main__":
    main(int(sys.argv[1]))
