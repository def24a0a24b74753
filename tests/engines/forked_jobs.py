"""Runs jobs in forked processes, which die where they are told to. A script: a line of scenarios in, one of outcomes
out, both JSON, for as long as lines come.

Importing torch and its exporter takes seconds, so that is done once, and every process of every scenario is a fork of
this one. It starts no threads: a fork of a process with running threads could not go on.

A scenario has "job", the file; "world", the number of processes, and their "port"; "environment" and "options" of the
command; "after", the seconds after which the first process is killed; and "kill", {"rank", "phase", "batch", "signal"}.
An outcome has "codes", the exit code or -signal of each process, and "err", its stdout and stderr.

Phases, all in the k-th batch that the process measures: "loading" (in the transform), "running" (half through its
nodes), "merging" (half through adding it to the total), "writing" (the next checkpoint is written, and not renamed
yet), "written" (it was just renamed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - imported once, here
import torch
from calibcast.calib.execution import ProgramRunner
from calibcast.calib.observer import Observer
from calibcast.calib.statistics import Statistics
from calibcast.engines.cli import _run


class Armed:
    """Makes this process kill itself at a place of the code."""

    def __init__(self, kill: dict[str, Any]) -> None:
        self.phase, self.batch, self.started = kill["phase"], kill["batch"], 0
        self.signal = getattr(signal, kill.get("signal", "SIGKILL"))
        self.run, self.watch, self.merge, self.replace = ProgramRunner.run, Observer.watch, Statistics.merge, os.replace
        places = {"running": (Observer, "watch"), "merging": (Statistics, "merge"), "writing": (os, "replace"),
                  "written": (os, "replace")}  # fmt: skip
        armed = self
        wrappers = {
            "watch": lambda *arguments: armed.dying_watch(*arguments),
            "merge": lambda *arguments: armed.dying_merge(*arguments),
            "replace": lambda *arguments: armed.dying_replace(*arguments),
        }
        setattr(ProgramRunner, "run", lambda *arguments: armed.counted_run(*arguments))  # noqa: B010
        if self.phase == "loading":
            os.environ["DIE_AT"] = f"{self.batch} {int(self.signal)}"  # the job's transform looks at it
        else:
            owner, name = places[self.phase]
            setattr(owner, name, wrappers[name])

    def die(self) -> None:
        os.kill(os.getpid(), self.signal)

    def counted_run(self, *arguments: Any) -> Any:
        self.started += 1
        return self.run(*arguments)

    def dying_watch(self, observer: Observer, name: str, *rest: Any) -> None:
        if self.started == self.batch and "layer_norm" in name:
            self.die()
        self.watch(observer, name, *rest)

    def dying_merge(self, total: Statistics, other: Statistics) -> None:
        if self.started == self.batch:
            before = total.counts.clone()
            total.counts.add_(other.counts)  # a part of it is done
            self.die()
            total.counts.copy_(before)  # only a signal that waits comes here
        self.merge(total, other)

    def dying_replace(self, source: Any, target: Any) -> None:
        at = self.started >= self.batch and str(target).endswith(".npz")
        if at and self.phase == "writing":
            self.die()
        self.replace(source, target)
        if at and self.phase == "written":
            self.die()


def process(scenario: dict[str, Any], rank: int, err: str) -> int:
    """One process of a scenario: its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        os.environ |= scenario.get("environment", {})
        world = scenario.get("world", 1)
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(scenario["port"])}  # fmt: skip
        kill = scenario.get("kill")
        if kill and kill.get("rank", 0) == rank:
            Armed(kill)
        code = _run(["run", scenario["job"], *scenario.get("options", [])])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(scenario: dict[str, Any], folder: str) -> dict[str, Any]:
    files = [f"{folder}/{rank}.err" for rank in range(scenario.get("world", 1))]
    for file in files:
        Path(file).unlink(missing_ok=True)
    children = [process(scenario, rank, file) for rank, file in enumerate(files)]
    if scenario.get("after") is not None:
        time.sleep(scenario["after"])
        os.kill(children[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "err": [Path(file).read_text() for file in files]}


def main() -> None:
    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))  # imports what an export needs
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps([outcome(scenario, folder) for scenario in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
