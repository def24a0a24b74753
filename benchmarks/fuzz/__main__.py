"""Many random programs under random plans, all laws on each.

    python -m benchmarks.fuzz --graphs 2000 --seed 0
    python -m benchmarks.fuzz --seed 0 --only 17          # one of them again

Every draw depends on its seed and number alone. A failure is told with the law, the smallest program found that still
breaks it, and the command that repeats it; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections import Counter

import torch

from benchmarks.fuzz.judgement import Failure, NotExportedError, judge, shrunk
from benchmarks.fuzz.programs import KINDS, STEPS, Draw, drawn, exported


def main() -> int:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    logging.getLogger("calibcast").setLevel(logging.ERROR)  # a node that refuses half falls back, and says so
    numbers = [arguments.only] if arguments.only is not None else range(arguments.first, arguments.graphs)
    failures: list[tuple[int, Failure]] = []
    refused: Counter[str] = Counter()
    used: Counter[str] = Counter()
    started, judged = time.perf_counter(), 0
    for number in numbers:
        draw = drawn(arguments.seed, number)
        try:
            failure = judge(draw)
        except NotExportedError as error:
            refused[str(error)[:110]] += 1
            continue
        judged += 1
        used.update({step.op for step in draw.recipe.steps})
        if failure is not None:
            failure = failure if arguments.no_shrink else shrunk(failure)
            failures.append((number, failure))
            print(_failure(arguments.seed, number, failure), flush=True)
        if judged % 100 == 0:
            print(f"{judged} graphs, {len(failures)} failures, {time.perf_counter() - started:.0f} s", flush=True)
        if len(failures) >= arguments.most_failures:
            break
    print(_summary(judged, refused, used, failures, time.perf_counter() - started))
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one draw to judge")
    parser.add_argument("--most-failures", type=int, default=20, help="stop after so many")
    parser.add_argument("--no-shrink", action="store_true")
    return parser.parse_args()


def _failure(seed: int, number: int, failure: Failure) -> str:
    return (
        f"\nFAILED {failure.law}: {failure.message}\n"
        f"  repeat: python -m benchmarks.fuzz --seed {seed} --only {number}\n"
        f"  smallest: {failure.draw}\n{_graph(failure.draw)}"
    )


def _graph(draw: Draw) -> str:
    lines = str(exported(draw.recipe).graph).splitlines()
    return "\n".join(f"    {line.strip()}" for line in lines if "placeholder" not in line and line.strip())


def _summary(
    judged: int, refused: Counter[str], used: Counter[str], failures: list[tuple[int, Failure]], seconds: float
) -> str:
    kinds = ", ".join(f"{len(steps)} {name}" for name, steps in KINDS.items())
    lines = [
        f"{judged} graphs judged in {seconds:.0f} s ({torch.get_num_threads()} threads, torch {torch.__version__})",
        f"steps: {len(STEPS)} ({kinds}); {len(STEPS.keys() - used.keys())} never drawn",
        f"failures: {len(failures)}" + "".join(f"; {law} {n}" for law, n in _by_law(failures)),
        f"not exported by torch: {sum(refused.values())}",
        *(f"  {count} x {reason}" for reason, count in refused.most_common(5)),
    ]
    return "\n".join(lines)


def _by_law(failures: list[tuple[int, Failure]]) -> list[tuple[str, int]]:
    return Counter(failure.law for _, failure in failures).most_common()


if __name__ == "__main__":
    sys.exit(main())
