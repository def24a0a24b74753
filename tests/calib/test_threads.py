"""What belongs to a thread or to the whole process is as it was, however calls on several threads overlap."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from calibcast.calib import BatchError, ProgramError, calibrate
from calibcast.calib.gc_pause import paused
from calibcast.calib.process_settings import HeldSetting, own_output_kept, unlogged
from calibcast.calib.pt2.loading import _LOUD, load_checked
from calibcast.calib.rounding import _precisions, fp32_kernels
from calibcast.calib.rounding_gradients import _CUDNN_OFF
from calibcast.engines import build
from calibcast.engines.locations import load_model
from calibcast.passes import PrecisionPlan, classify, compare, insert_casts
from torch import nn

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Net(nn.Module):
    """With a region that sets gradients, one of autocast, and one of vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.linear(x)
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.linear(y)
        return torch.vmap(lambda row: row.sin() * 2)(z.float())


def on_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    results: list[Any] = [None] * count
    failed: list[BaseException] = []
    together = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            together.wait()
            results[number] = work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    return results


def state() -> tuple[Any, ...]:
    loggers = [logging.root, *(logging.getLogger(name) for name in ("torch", *_LOUD))]
    handlers = [tuple(handler.filters) for logger in loggers for handler in logger.handlers]
    levels = [(logger.level, tuple(logger.filters)) for logger in loggers], handlers
    return gc.isenabled(), tuple(_precisions()), torch.backends.cudnn.enabled, levels, logging.root.manager.disable


def test_each_thread_keeps_its_own_autograd_state() -> None:
    """Half of the threads have gradients switched off, one of them is in inference mode; all run every stage."""
    program = torch.export.export(Net().eval(), (X,))
    alone = calibrate(program, [X, X * 2], progress=False).frame
    before = state()

    def work(number: int) -> tuple[bool, bool, bool, Any]:
        torch.set_grad_enabled(number % 2 == 0)
        with torch.inference_mode() if number == 3 else nullcontext():  # inference_mode(False) enables gradients
            ranges = calibrate(program, [X, X * 2], progress=False)
            mixed = insert_casts(program, classify(program, ranges))
            PrecisionPlan.from_autocast(program, torch.float16)
            compare(program, mixed, [X], progress=False)
            result = build(mixed, backend="eager", progress=False)(X)
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert not result.requires_grad
        assert torch._C._functorch.maybe_current_level() is None
        return *modes, torch.is_autocast_enabled("cpu"), ranges.frame

    for number, (grads, inference, autocast, frame) in enumerate(on_threads(work)):
        assert (grads, inference, autocast) == (number in {0, 2}, number == 3, False)
        assert frame.equals(alone, null_equal=True)
    assert state() == before
    assert torch.is_grad_enabled()
    assert (torch.ones(1, requires_grad=True) * 2).requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_leaves_the_autograd_state_of_its_thread(enabled: bool) -> None:
    class Picks(nn.Module):
        def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(not torch.is_grad_enabled()):
                return torch.vmap(lambda row: row.sin())(x)[i]

    program = torch.export.export(Picks(), (X, torch.tensor([0])))

    def work(number: int) -> tuple[bool, Any]:
        torch.set_grad_enabled(enabled)
        with pytest.raises(BatchError):
            calibrate(program, [(X, torch.tensor([9]))], progress=False)
        return torch.is_grad_enabled(), torch._C._functorch.maybe_current_level()

    assert on_threads(work, 2) == [(enabled, None)] * 2


SETTINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "gc": paused,
    "precision": fp32_kernels,
    "cudnn": _CUDNN_OFF.held,
    "loggers": lambda: unlogged(*_LOUD),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_overlapping_uses_leave_the_process_as_it_was(name: str) -> None:
    """The first to come is the first to go: what the second found is not what is to stay."""
    before = state()
    first, second = SETTINGS[name](), SETTINGS[name]()
    first.__enter__()
    inside = state()
    assert inside != before or name == "precision"
    second.__enter__()
    first.__exit__(None, None, None)
    assert name == "loggers" or state() == inside  # the second still needs it
    second.__exit__(None, None, None)
    assert state() == before


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.names.append(record.name)


def test_what_a_thread_logs_below_a_name_is_dropped_and_no_other() -> None:
    """Also of loggers that are made meanwhile, and of one with a handler of its own."""
    root, own = _Heard(), _Heard()
    logging.root.addHandler(root)
    child = logging.getLogger("tests.loud.child")
    child.addHandler(own)
    names = ["tests.loud", "tests.loud.child", f"tests.loud.new{id(root)}", "tests.louder", "tests"]
    other = threading.Thread(target=lambda: [logging.getLogger(name).error("other") for name in names])
    try:
        with unlogged("tests.loud"):
            for name in names:
                logging.getLogger(name).error("mine")
            assert (root.names, own.names) == (["tests.louder", "tests"], [])
            other.start()
            other.join()
            assert (root.names[2:], own.names) == (names, ["tests.loud.child"])
        child.error("after")
        assert (root.names[-1], len(own.names)) == ("tests.loud.child", 2)
    finally:
        logging.root.removeHandler(root)
        child.removeHandler(own)


def test_models_that_fail_to_export_on_threads_leave_logging_and_streams(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """While one exports, another thread logs and prints: nothing of that is lost or comes out elsewhere."""
    (tmp_path / "user.py").write_text(
        "import torch, time\n"
        "class N(torch.nn.Module):\n    def forward(self, x):\n"
        "        print('of the model'); time.sleep(0.05)\n        return x if x.sum() > 0 else 1\n"
        "def net(): return N(), (torch.randn(2, 4),)\n"
    )
    before = state(), sys.stdout, sys.stderr

    def work(number: int) -> None:
        if number == 0:
            for _ in range(10):
                print("of a thread")
                logging.getLogger("calibcast.tests").error("of a thread")
                time.sleep(0.01)
            return
        with pytest.raises(ProgramError, match="cannot export"):
            load_model(f"{tmp_path}/user.py:net")

    on_threads(work, 2)
    assert (state(), sys.stdout, sys.stderr) == before
    said = capfd.readouterr()
    assert said.out.count("of a thread") == 10
    assert "of the model" not in said.out


def test_streams_are_as_they_were_whoever_ends_first(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    first, second = own_output_kept(), own_output_kept()
    kept = first.__enter__()
    later = second.__enter__()
    print("mine")
    first.__exit__(None, None, None)
    print("later", file=sys.stderr)
    second.__exit__(None, None, None)
    assert (sys.stdout, sys.stderr) == before
    print("out")
    assert (kept.getvalue(), later.getvalue(), capsys.readouterr().out) == ("", "mine\nlater\n", "out\n")


def test_a_setting_that_cannot_be_set_is_left_as_it_was() -> None:
    kept = ["as it was"]

    def write(value: str) -> None:
        kept[:] = [value]
        if value == "wanted":
            raise RuntimeError("no")

    setting = HeldSetting(lambda: kept[0], write, "wanted")
    with pytest.raises(RuntimeError, match="no"), setting.held():
        pytest.fail("it was entered")
    assert kept == ["as it was"]


def test_a_stream_that_was_taken_out_lives_on_for_a_print_of_another_thread() -> None:
    """`print` asks sys.stdout for its `write` twice, for the text and for the line end, and keeps no reference between
    them: Python crashed where the stream was freed meanwhile."""
    in_print, may_go_on = threading.Event(), threading.Event()

    class Slow:
        def __str__(self) -> str:
            in_print.set()
            assert may_go_on.wait(60)
            return ""

    printing = threading.Thread(target=lambda: print(Slow()))
    with own_output_kept():
        stand_in = weakref.ref(sys.stdout)
        printing.start()
        assert in_print.wait(60)
    gc.collect()
    assert stand_in() is not None
    may_go_on.set()
    printing.join()
    assert stand_in() is not None


def test_programs_that_are_loaded_at_once_leave_torchs_loggers(tmp_path: Any) -> None:
    path = tmp_path / "p.pt2"
    torch.export.save(torch.export.export(nn.Linear(8, 8).eval(), (X,)), path)
    before = state()
    on_threads(lambda _: load_checked(path), 4)
    assert state() == before
