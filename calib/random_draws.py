"""Random numbers for programs that draw some: the same for each run of a batch, and none of the caller's.

torch's generators belong to the process. A program with dropout, `rand` or `bernoulli` draws from them: run beside
another, it would get other numbers, and the caller's next numbers would not be those that a seed promised.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from zlib import crc32

import torch
from calibcast.calib.training_mode import draws
from torch import fx
from torch.export import ExportedProgram

# Programs that are judged draw other numbers than those that calibration has seen.
CALIBRATED, JUDGED = "calibrated", "judged"
_LIBRARIES = {"aten", "prims", "prim", "higher_order", "_operator"}
_ONE_AT_A_TIME = threading.RLock()
Step = TypeVar("Step")
Result = TypeVar("Result")


class Draws:
    """What programs draw, batch by batch: numbers that depend on the batch's index alone.

    So each run of a batch sees the same, whichever process runs it, and after how many others. stream: numbers of
    another name are other numbers. needed: False where nothing is drawn; then nothing is touched.
    """

    def __init__(self, stream: str = CALIBRATED, needed: bool = True) -> None:
        self._stream, self.needed = stream, needed

    @classmethod
    def of(cls, *programs: ExportedProgram, stream: str = CALIBRATED) -> Draws:
        """needed: where an operator of one of the programs draws numbers, or may do so: torch does not know it."""
        return cls(stream, any(draws(node) or _is_foreign(node) for one in programs for node in _nodes(one)))

    @contextmanager
    def of_batch(self, index: int) -> Iterator[None]:
        """Inside, torch's generators give the numbers of batch `index`; then, they are as the caller left them.

        The generators are the process's, so only one thread at a time may be inside.
        """
        if not self.needed:
            yield
            return
        with _ONE_AT_A_TIME:
            before = random_state()
            try:
                _seed(crc32(f"{self._stream} {index}".encode()))
                yield
            finally:
                set_random_state(before)

    def alone(self, steps: Generator[Step, None, Result]) -> Generator[Step, None, Result]:
        """Steps of a run that go on drawing where they stopped, whatever is drawn in between. Call it in `of_batch`."""
        return self._alone(steps, random_state()) if self.needed else steps

    def _alone(self, steps: Generator[Step, None, Result], state: list[Any]) -> Generator[Step, None, Result]:
        while True:
            between = random_state()
            set_random_state(state)
            try:
                step = next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result
            finally:
                state = random_state()
                set_random_state(between)
            yield step


def drawing_nodes(program: ExportedProgram) -> list[str]:
    """The names of the nodes that draw random numbers when they run, regions and branches included."""
    return [node.name for node in _nodes(program) if draws(node)]


def _nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def may_draw(node: fx.Node) -> bool:
    """Whether a node may draw random numbers when it runs, by itself or in a graph of its own."""
    return draws(node) or _is_foreign(node) or isinstance(node.target, torch._ops.HigherOrderOperator)


def any_may_draw(program: ExportedProgram) -> bool:
    """Whether a program may draw random numbers, which a recording of it would repeat."""
    return any(may_draw(node) for node in _nodes(program))


def _is_foreign(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _LIBRARIES


def random_state() -> list[Any]:
    """The state of torch's generators: the host's and, if CUDA is in use, that of each GPU."""
    return [generator.get_state() for generator in _generators()]


def set_random_state(state: Sequence[Any]) -> None:
    """Back to what `random_state` gave. A GPU that came into use since then keeps its own."""
    for generator, held in zip(_generators(), state, strict=False):
        generator.set_state(held)


def _seed(seed: int) -> None:
    for generator in _generators():
        generator.manual_seed(seed)


def _generators() -> list[torch.Generator]:
    # `torch.manual_seed` and the like would also bring CUDA into use, or leave it a seed for when it comes.
    cuda: Any = torch.cuda
    gpus = cuda.default_generators if cuda.is_initialized() else ()
    return [torch.default_generator, *gpus]
