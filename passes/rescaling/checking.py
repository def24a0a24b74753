"""Whether two programs give the same bits in fp32, checked by running both: a second proof beside the range table's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.execution import ProgramRunner, Ran, tensors_of
from calibcast.calib.random_draws import JUDGED, Draws
from calibcast.calib.rounding import fp32_kernels
from calibcast.calib.sequences import FlatInputs
from calibcast.passes.rescaling.exactness import Refusal
from calibcast.passes.rescaling.rewriting import Exponents
from torch.export import ExportedProgram

MOST_CHECKED = 2


@dataclass(frozen=True)
class Check:
    """Batches on which the program and its rescaled copy are run. device: None is the program's own. carry_state: each
    batch goes on from what the one before left in the buffers, until a batch is a `NewSequence`."""

    program: ExportedProgram
    batches: tuple[FlatInputs, ...]
    device: torch.device | str | None = None
    carry_state: bool = False

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        dataloader: Iterable[Any],
        transform: Callable[[Any], Any] | None,
        device: torch.device | str | None,
        carry_state: bool = False,
    ) -> Check:
        """On the first two batches. Raises BatchError as `calibrate` does."""
        first = list(islice(dataloader, MOST_CHECKED))
        flat = tuple(flat for _, _, flat in numbered(first, signature_of(program), transform))
        return cls(program, flat, device, carry_state)

    def difference(self, made: ExportedProgram, exponents: Exponents) -> Refusal | None:
        """The first node whose result is not 2^-k times the original's; None where the programs' results are the same.

        Both compute in fp32 without TF32, also where the process allows it.
        """
        ours, theirs = (ProgramRunner(p, self.device, carry_state=self.carry_state) for p in (made, self.program))
        draws = Draws.of(made, self.program, stream=JUDGED)
        with torch.no_grad(), fp32_kernels():
            for index, flat in enumerate(self.batches):
                if flat.begins:
                    ours.reset()
                    theirs.reset()
                held, before = theirs.to_device(flat), (ours.state, theirs.state)
                with draws.of_batch(index):
                    results = ours.run(held)
                with draws.of_batch(index):
                    same = all(map(_same, results, theirs.run(held)))
                if not same:
                    ours.restore(before[0])
                    theirs.restore(before[1])
                    with draws.of_batch(index):
                        made_steps, wanted = draws.alone(ours.steps(held)), draws.alone(theirs.steps(held))
                        return _first(made_steps, wanted, exponents, index)
        return None


def _first(steps: Iterator[Ran], wanted: Iterable[Ran], exponents: Exponents, index: int) -> Refusal:
    for want in wanted:
        made = next((ran for ran in steps if ran.name == want.name), None)
        given = {} if made is None else dict(tensors_of(made.node, made.result))
        for output, tensor in tensors_of(want.node, want.result):
            k = exponents.tensors.get((want.name, output), 0)
            scaled = tensor * 2.0**-k if k else tensor
            if output in given and not _same(given[output], scaled):
                return Refusal(want.name, f"run on batch {index}, its fp32 result is not that of the original")
    return Refusal("output", f"run on batch {index}, fp32 results are not those of the original")


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    # NaN counts as equal to NaN.
    both = torch.isnan(one) & torch.isnan(other)
    return bool(((one == other) | both).all())
