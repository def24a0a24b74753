"""What every result starts with: the command, the machine, the versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "polars",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
)


def header() -> str:
    """Markdown lines that say where numbers come from."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    command = f"python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}"
    return (
        f"- command: `{command}`\n"
        f"- machine: {_processor()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}{gpu}\n"
        f"- versions: Python {platform.python_version()}, {', '.join(found)}\n"
        f"- date: {datetime.now(UTC):%Y-%m-%d}\n"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: str | None, text: str) -> None:
    """Print a result, and keep it where it was asked for."""
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
