"""Ask the real TensorRT-RTX builder whether it accepts the program in a .pt2 file. Needs no GPU.

    python tests/engines/rtx_builder.py mixed.pt2

Prints the size of the engine files in bytes; a refusal or a crash of the builder is a BuildError and exit status 1.
"""

import sys
import tempfile
from pathlib import Path

from calibcast.calib.artifacts import load_program
from calibcast.engines import build


def engine_bytes(program, **arguments):
    """The size of the engines of `program`, built ahead of time. Raises BuildError."""
    engine = build(program, backend="tensorrt", ahead_of_time=True, cache=False, progress=False, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder) / "engine")
        return sum(path.stat().st_size for path in Path(folder).rglob("*.engine"))


if __name__ == "__main__":
    print("engine bytes:", engine_bytes(load_program(sys.argv[1])))
