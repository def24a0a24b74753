"""What an installed calibcast is: one import package, quick to import, beside a user's own folders of any name."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import calibcast
import pytest
from calibcast import calib, engines, passes

SLOW = ("torch", "polars", "tensorrt", "torch_tensorrt", "plotly")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python in `cwd`, without the checkout on its path unless it is installed there."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )


def test_the_distribution_has_one_import_package() -> None:
    assert (distribution("calibcast").read_text("top_level.txt") or "").split() == ["calibcast"]


def test_every_public_name_of_the_three_packages_is_one_of_calibcast() -> None:
    for package in (calib, passes, engines):
        for name in package.__all__:
            assert getattr(calibcast, name) is getattr(package, name)
    assert list(calibcast.__all__) == sorted({*calib.__all__, *passes.__all__, *engines.__all__})
    assert set(calibcast.__all__) <= set(dir(calibcast))


def test_an_unknown_name_is_told_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'classfy'; it has .*classify"):
        calibcast.classfy  # noqa: B018


def test_importing_calibcast_imports_nothing_slow(tmp_path: Path) -> None:
    done = python("-c", f"import sys, calibcast; print(sorted(set({SLOW!r}) & set(sys.modules)))", cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_folders_of_the_users_named_as_ours_stay_theirs(tmp_path: Path) -> None:
    for name in ("calib", "passes", "engines", "tests", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    script = (
        "import calib, passes, engines, tests, benchmarks; assert engines.MINE and calib.MINE and passes.MINE\n"
        "import calibcast; print(calibcast.Verdict('mine', 'why').rule, calibcast.engines.__name__)"
    )
    assert python("-c", script, cwd=tmp_path).stdout.split() == ["mine", "calibcast.engines"]


def test_the_module_is_the_command_line(tmp_path: Path) -> None:
    done = python("-m", "calibcast", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "calibcast [OPTIONS] COMMAND" in done.stdout
