"""What share of small changes to `calib/` and `passes/` the tests notice.

    pip install cosmic-ray coverage
    python -m benchmarks.mutations cover /tmp/cover.json      # which test runs which line: 20 minutes
    python -m benchmarks.mutations run /tmp/cover.json --seed 0 -o benchmarks/results/mutations.md
    python -m benchmarks.mutations cover /tmp/cover.json --files tests/passes/test_new.py  # and run again

Run it on a copy of the tree: each mutant is written over its file while its tests run. cosmic-ray makes the changes. It
would run the same tests for all of them and import torch for each; here every run is a fork of a process that has
imported it, and the tests are those that run the changed line: first those of the file of the same name, then the
quickest of each other file, until they would take `--seconds`. A mutant is killed if one of them fails, or hangs.
What was found is kept beside the cover, in `.outcomes.json`: killed mutants are not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import coverage
import datasets  # noqa: F401 - imported once, here, as are the next
import hypothesis  # noqa: F401
import polars  # noqa: F401
import pytest
import torch
import torchvision  # noqa: F401

from benchmarks.machine import header, write
from benchmarks.mutations.contexts import Contexts
from benchmarks.mutations.sample import FOLDERS, Mutant, drawn, in_function

ROOT = Path.cwd()
PYTEST = ("-n", "0", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly")
# Minutes long; they hold networks and laws, not one file.
LONG = {"test_architectures.py", "test_program_zoo.py", "test_fuzz.py", "test_random_programs.py"}
Cover = dict[str, Any]


def forked(work: Callable[[], int], seconds: float) -> int | None:
    """The exit code of `work` in a process of its own without output; None if it was still running after `seconds`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.dont_write_bytecode = True
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def covered(files: Iterable[Path], total: Cover, limit: float) -> Iterator[Cover]:
    """`total` after each of these test files, with the seconds of its tests, and the tests of each line."""
    part = Path(tempfile.mkdtemp()) / "part.json"
    for file in files:
        part.unlink(missing_ok=True)
        began = time.monotonic()
        code = forked(partial(covered_by, file, part), limit)
        print(f"{file.name}: exit {code}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if not part.exists():
            continue
        one = json.loads(part.read_text())
        total["seconds"] |= one["seconds"]
        for path, lines in one["lines"].items():
            kept = total["lines"].setdefault(path, {})
            for line, contexts in lines.items():
                kept.setdefault(line, []).extend(contexts)
        yield total


def covered_by(file: Path, part: Path) -> int:
    measured = coverage.Coverage(
        data_file=None, include=[f"{ROOT}/{folder}/*" for folder in FOLDERS], config_file=False
    )
    plugin = Contexts(measured)
    measured.start()
    code = pytest.main([*PYTEST, str(file)], plugins=[plugin])
    measured.stop()
    data, lines = measured.get_data(), {}
    for path in data.measured_files():
        by_line = data.contexts_by_lineno(path)
        lines[str(Path(path).relative_to(ROOT))] = {n: sorted(filter(None, names)) for n, names in by_line.items()}
    part.write_text(json.dumps({"seconds": plugin.seconds, "lines": lines}))
    return int(code)


def tests_of(mutant: Mutant, cover: Cover, seconds: float) -> list[str]:
    """The tests that run the mutant's line, as many as take `seconds`, and at least one."""
    lines = cover["lines"].get(mutant.path, {})
    at_line = lines.get(str(mutant.line)) if in_function(ROOT / mutant.path, mutant.line) else None
    contexts = at_line or [name for names in lines.values() for name in names]
    chosen = {name.removesuffix("|call") for name in contexts if name.endswith("|call")}
    files = {name.split("::")[0] for name in contexts if name.endswith("|setup")}
    if not at_line:  # run when it is imported, such as a table
        files |= {file for test in cover["seconds"] if _words(file := test.split("::")[0]) & _words(mutant.path)}
    chosen |= {test for test in cover["seconds"] if test.split("::")[0] in files}
    ranks: dict[str, int] = defaultdict(int)
    order = []
    for test in sorted(chosen, key=lambda test: cover["seconds"].get(test, 1e9)):
        file = test.split("::")[0]
        alike = not at_line and bool(_words(file) & _words(mutant.path))
        first = alike or Path(file).stem == f"test_{Path(mutant.path).stem}"
        order.append((0 if first else 1 + ranks[file], len(order), test))
        ranks[file] += 1
    taken: list[str] = []
    for _, _, test in sorted(order):
        seconds -= cover["seconds"].get(test, 1e9)
        if seconds < 0 and taken:
            break
        taken.append(test)
    return taken


def _words(path: str) -> set[str]:
    """`operator`, `table` of tests/calib/test_operator_table.py; `operator`, `sum` of calib/operators/sums.py."""
    parts = Path(path).with_suffix("").parts
    named = parts[-1:] if path.startswith("tests") else parts[1:]
    return {word.rstrip("s") for part in named for word in part.split("_")} - {"test", "", "__init__"}


def outcome(mutant: Mutant, tests: list[str], limit: float) -> str:
    """ "killed", "survived", or "no test" where none runs its line."""
    if not tests:
        return "no test"
    path = ROOT / mutant.path
    source = path.read_text(encoding="utf-8")
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        stale.unlink()
    try:
        path.write_text(mutant.code(source), encoding="utf-8")
        return "survived" if forked(lambda: int(pytest.main([*PYTEST, *tests])), limit) == 0 else "killed"
    finally:
        path.write_text(source, encoding="utf-8")


def test_files() -> list[Path]:
    """All of the two folders but the long ones."""
    files = [path for folder in FOLDERS for path in (ROOT / "tests" / folder).glob("test_*.py")]
    return sorted(file for file in files if file.name not in LONG)


def report(found: list[tuple[Mutant, str, int]], names: str) -> str:
    killed = sum(outcome == "killed" for _, outcome, _ in found)
    lines = [f"**{killed} of {len(found)} mutants are killed: {killed / max(1, len(found)):.1%}.**", ""]
    lines += [names, "", "| mutant | outcome | tests tried |", "|---|---|---|"]
    lines += [f"| `{mutant}` | {said} | {tried} |" for mutant, said, tried in found if said != "killed"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cover", "run"])
    parser.add_argument("cover")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests for a mutant")
    parser.add_argument("--minutes", type=float, default=50.0, help="after which no other mutant is begun")
    parser.add_argument("-o", "--output")
    parser.add_argument("--files", type=Path, nargs="+", help="of `cover`: these alone, added to what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cover = Path(options.cover)
    if options.what == "cover":
        before: Cover = json.loads(cover.read_text()) if options.files else {"seconds": {}, "lines": {}}
        files = [file.resolve() for file in options.files or test_files()]
        for so_far in covered(files, before, limit=300.0):
            cover.write_text(json.dumps(so_far))
        return
    found = tried(json.loads(cover.read_text()), cover.with_suffix(".outcomes.json"), options)
    body = report(
        found, f"The first {len(found)} of {options.count} places drawn with seed {options.seed}. Not killed:"
    )
    write(options.output, f"# Mutations of calib/ and passes/\n\n{header()}\n{body}")


def tried(cover: Cover, kept: Path, options: argparse.Namespace) -> list[tuple[Mutant, str, int]]:
    """The outcome of each mutant, those of `kept` that were killed before among them, until time is up."""
    known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    found: list[tuple[Mutant, str, int]] = []
    until = time.monotonic() + 60 * options.minutes
    for mutant in drawn(ROOT, options.count, options.seed):
        tests = tests_of(mutant, cover, options.seconds)
        late = time.monotonic() > until
        if late and repr(mutant) not in known:
            break
        if known.get(repr(mutant)) != "killed" and not late:
            known[repr(mutant)] = outcome(mutant, tests, limit=8 * options.seconds)
            kept.write_text(json.dumps(known))
            print(f"{known[repr(mutant)]:9} {len(tests):3} {mutant}", file=sys.stderr, flush=True)
        found.append((mutant, known[repr(mutant)], len(tests)))
    return found


if __name__ == "__main__":
    main()
