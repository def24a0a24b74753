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
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
from benchmarks.mutations.sample import FOLDERS, Mutant, drawn, in_function, read_at
from benchmarks.mutations.unseen import no_change, unseen

ROOT = Path.cwd()
PYTEST = ("-n", "0", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
# Minutes long; they hold networks and laws, not one file.
LONG = {"test_architectures.py", "test_program_zoo.py", "test_fuzz.py", "test_random_programs.py"}
# Seconds of the tests of a file of the same name, for a line that only another process runs.
LONGEST = 120.0
# They look at every module, so they come first for what runs when one is imported.
EVERYWHERE = ("test_dataclasses.py",)
KILLED = ("killed", "hung")
Cover = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Of one process. cpu: seconds of the processor, which do not depend on what else the machine does. wall: seconds
    of the clock. memory: bytes."""

    cpu: float
    wall: float
    memory: int = 6 << 30


def forked(work: Callable[[], int], limits: Limits) -> int | str:
    """The exit code of `work` in a process of its own without output.

    "hung" where it used up its processor time, "late" where the clock ran out before that.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.dont_write_bytecode = True
        used = int(time.process_time() + limits.cpu) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used, used + 10))
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    until = time.monotonic() + limits.wall
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "hung" if code == -signal.SIGXCPU else code
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def covered(files: Iterable[Path], total: Cover, limit: float) -> Iterator[Cover]:
    """`total` after each of these test files, with the seconds of its tests, and the tests of each line."""
    part = Path(tempfile.mkdtemp()) / "part.json"
    for file in files:
        part.unlink(missing_ok=True)
        began = time.monotonic()
        code = forked(partial(covered_by, file, part), Limits(limit, 4 * limit))
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
    """The tests that run the mutant's line, or read what it sets, as many as take `seconds`, and at least one.

    First those of the file of the same name, then those that run much of the mutant's file and little else. One test of
    each function comes before the second parameters of any, as these mostly see what the first saw.
    """
    lines = cover["lines"].get(mutant.path, {})
    each_time = in_function(ROOT / mutant.path, mutant.line)
    at_line = lines.get(str(mutant.line)) if each_time else None
    if not each_time:  # a constant: the tests that run a line that reads it
        read = read_at(ROOT, mutant.path, mutant.line)
        at_line = [
            name for path, at in read.items() for n in at for name in cover["lines"].get(path, {}).get(str(n), [])
        ]
    contexts = at_line or [name for names in lines.values() for name in names]
    chosen = {name.removesuffix("|call") for name in contexts if name.endswith("|call")}
    files = {name.split("::")[0] for name in contexts if name.endswith("|setup")}
    if not at_line:  # run when it is imported, such as a table
        files |= {file for test in cover["seconds"] if _words(file := test.split("::")[0]) & _words(mutant.path)}
    chosen |= {test for test in cover["seconds"] if test.split("::")[0] in files}
    here, everywhere = lines_by_test(lines), cover["tests"]
    known = [test for test in chosen if test in cover["seconds"]]  # the others fail without a mutant
    ranks: dict[str, int] = defaultdict(int)
    ranked = []
    for test in sorted(known, key=lambda test: (everywhere.get(test, 0) / (1 + here.get(test, 0)), test)):
        function = test.split("[")[0]
        ranked.append((ranks[function], len(ranked), test))
        ranks[function] += 1
    ordered = [test for _, _, test in sorted(ranked)]
    near = [test for test in ordered if _is_near(test.split("::")[0], mutant.path, bool(at_line))]
    if not at_line:
        near = [test for test in cover["seconds"] if test.split("::")[0].endswith(EVERYWHERE)] + near
    elsewhere = each_time and not at_line  # in another process, which coverage does not see
    taken = _fitting(near, cover["seconds"], LONGEST if elsewhere else seconds / 2)
    taken += _fitting([test for test in ordered if test not in near], cover["seconds"], seconds / 2)
    return taken or near[:1] or ordered[:1]


def _fitting(tests: list[str], each: dict[str, float], seconds: float) -> list[str]:
    """Those that take `seconds`; a test that does not fit is left out, not those behind it."""
    taken = []
    for test in tests:
        if each[test] <= seconds:
            seconds -= each[test]
            taken.append(test)
    return taken


def _is_near(file: str, path: str, in_function: bool) -> bool:
    """Whether a file of tests has the name of the mutant's file, or a word of it for what runs at import."""
    return Path(file).stem.startswith(f"test_{Path(path).stem}") or (
        not in_function and bool(_words(file) & _words(path))
    )


def lines_by_test(lines: dict[str, list[str]]) -> dict[str, int]:
    """How many of these lines each test runs."""
    found: dict[str, int] = defaultdict(int)
    for names in lines.values():
        for name in names:
            found[name.removesuffix("|call")] += 1
    return found


def _words(path: str) -> set[str]:
    """`operator`, `table` of tests/calib/test_operator_table.py; `operator`, `sum` of calib/operators/sums.py."""
    parts = Path(path).with_suffix("").parts
    named = parts[-1:] if path.startswith("tests") else parts[1:]
    return {word.rstrip("s") for part in named for word in part.split("_")} - {"test", "", "__init__"}


class FirstFailure:
    """A pytest plugin that writes the name of the first test that fails to a file."""

    def __init__(self, into: Path) -> None:
        self.into = into

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.into.exists():
            self.into.write_text(report.nodeid)


def outcome(mutant: Mutant, cover: Cover, seconds: float) -> tuple[str, int]:
    """ "killed", "hung" (which counts as killed), "survived", "late" (which does not), or "no test" runs its line; and
    how many tests were tried.

    A mutant is killed only by a test that fails with it and passes without it. A test that fails without it, too, is
    taken out of `cover`, and the mutant is tried again.
    """
    path = ROOT / mutant.path
    source = path.read_text(encoding="utf-8")
    for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        stale.unlink()
    while tests := tests_of(mutant, cover, seconds):
        try:
            path.write_text(mutant.code(source), encoding="utf-8")
            found, failed = run(tests, seconds)
        finally:
            path.write_text(source, encoding="utf-8")
        if isinstance(found, str) or found == 0:
            return ("survived" if found == 0 else str(found)), len(tests)
        if failed is None or run([failed], seconds)[0] == 0:  # without a failed test, it does not even import
            return "killed", len(tests)
        print(f"fails without a mutant: {failed}", file=sys.stderr, flush=True)
        del cover["seconds"][failed]
    return "no test", 0


def run(tests: list[str], seconds: float) -> tuple[int | str, str | None]:
    """The exit code of these tests, or how they ended, and the first that failed."""
    into = Path(tempfile.mkdtemp()) / "failed"
    plugins = [FirstFailure(into)]
    found = forked(
        lambda: int(pytest.main([*PYTEST, "-x", *tests], plugins=plugins)), Limits(30 + 2 * seconds, 600 + 20 * seconds)
    )
    return found, into.read_text() if into.exists() else None


def collected() -> set[str]:
    """The tests that there are: a cover may know some that are gone."""
    into = Path(tempfile.mkdtemp()) / "tests"

    class Names:
        def pytest_collection_finish(self, session: Any) -> None:
            into.write_text("\n".join(item.nodeid for item in session.items))

    folders = [f"tests/{folder}" for folder in FOLDERS]
    forked(lambda: int(pytest.main([*PYTEST, "--collect-only", *folders], plugins=[Names()])), Limits(900, 1800))
    return set(into.read_text().split("\n"))


def test_files() -> list[Path]:
    """All of the two folders but the long ones."""
    files = [path for folder in FOLDERS for path in (ROOT / "tests" / folder).glob("test_*.py")]
    return sorted(file for file in files if file.name not in LONG)


def report(found: list[tuple[Mutant, str, int]], names: str) -> str:
    killed = sum(outcome in KILLED for _, outcome, _ in found)
    rules = Counter(rule for mutant, _, _ in found if (rule := unseen_by_rule(mutant)))
    visible = len(found) - rules.total()
    lines = [
        f"**{killed} of {visible} mutants are killed: {killed / max(1, visible):.1%}.** "
        f"{sum(outcome == 'hung' for _, outcome, _ in found)} of them hang. "
        f"With the {rules.total()} that rules leave out, as if none of these were seen: {killed} of {len(found)}, "
        f"{killed / max(1, len(found)):.1%}.",
        "",
        "| left out by rule | mutants |",
        "|---|---|",
        *(f"| {rule} | {count} |" for rule, count in rules.most_common()),
        "",
    ]
    lines += [names, "", "| mutant | outcome | tests tried |", "|---|---|---|"]
    lines += [f"| `{mutant}` | {said} | {tried} |" for mutant, said, tried in found if said not in {*KILLED, "unseen"}]
    return "\n".join(lines) + "\n"


def unseen_by_rule(mutant: Mutant) -> str | None:
    source = (ROOT / mutant.path).read_text(encoding="utf-8")
    rule = no_change(source, mutant.code(source))
    return rule or unseen(ROOT / mutant.path, mutant.line, mutant.column, mutant.operator)


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
    warm_up()
    cover = Path(options.cover)
    if options.what == "cover":
        before: Cover = json.loads(cover.read_text()) if options.files else {"seconds": {}, "lines": {}}
        files = [file.resolve() for file in options.files or test_files()]
        for so_far in covered(files, before, limit=300.0):
            cover.write_text(json.dumps(so_far))
        return
    known: Cover = json.loads(cover.read_text())
    known["tests"] = lines_by_test(
        {f"{path}:{n}": names for path, one in known["lines"].items() for n, names in one.items()}
    )
    there = collected()
    known["seconds"] = {test: cost for test, cost in known["seconds"].items() if test in there}
    found = tried(known, cover.with_suffix(".outcomes.json"), options)
    body = report(
        found, f"The first {len(found)} of {options.count} places drawn with seed {options.seed}. Not killed:"
    )
    write(options.output, f"# Mutations of calib/ and passes/\n\n{header()}\n{body}")


def warm_up() -> None:
    """Import once, here, what torch imports at the first export: 3 s that each fork would take."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    program.run_decompositions().module()(torch.ones(1, 2))


def tried(cover: Cover, kept: Path, options: argparse.Namespace) -> list[tuple[Mutant, str, int]]:
    """The outcome of each mutant, those of `kept` that were killed before among them, until time is up."""
    known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    found: list[tuple[Mutant, str, int]] = []
    until = time.monotonic() + 60 * options.minutes
    for mutant in drawn(ROOT, options.count, options.seed):
        tried = 0
        if unseen_by_rule(mutant):
            found.append((mutant, "unseen", 0))
            continue
        late = time.monotonic() > until
        if late and repr(mutant) not in known:
            break
        if known.get(repr(mutant)) not in KILLED and not late:
            known[repr(mutant)], tried = outcome(mutant, cover, options.seconds)
            kept.write_text(json.dumps(known))
            print(f"{known[repr(mutant)]:9} {tried:3} {mutant}", file=sys.stderr, flush=True)
        found.append((mutant, known[repr(mutant)], tried))
    return found


if __name__ == "__main__":
    main()
