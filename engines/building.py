"""`build`: makes an engine from a program whose graph states all types."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from calibcast.calib.aliasing import mutated_inputs
from calibcast.calib.batches import numbered, signature_of
from calibcast.calib.execution import require_program
from calibcast.calib.ranges import RangeTable
from calibcast.calib.sequences import FlatInputs
from calibcast.engines.backends import chosen
from calibcast.engines.engine import Engine
from calibcast.engines.ledger.ledger_text import require_precision, unknown_share
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.cache import DEFAULT_SIZE
from calibcast.passes.plan import PrecisionPlan
from torch.export import ExportedProgram

_log = logging.getLogger("calibcast")
MOST_TRIED = 2


def build(  # noqa: PLR0913 - the public contract
    mixed: ExportedProgram,
    plan: PrecisionPlan | None = None,
    ranges: RangeTable | None = None,
    backend: str = "auto",
    *,
    ahead_of_time: bool = False,
    strict_precision: bool = False,
    allow_unknown: bool = False,
    on_failure: str = "error",
    isolate: bool = True,
    build_timeout: float | None = 1800.0,
    cache: bool | str | Path = True,
    cache_size: int = DEFAULT_SIZE,
    progress: bool = True,
    batches: Iterable[Any] = (),
    transform: Callable[[Any], Any] | None = None,
    reference: ExportedProgram | None = None,
    carry_state: bool = False,
    **settings: Any,
) -> Engine:
    """Build an engine that runs `mixed` in exactly the types of its graph.

    Args:
        mixed: from `insert_casts`, or any exported program.
        plan, ranges: what decided the types; kept with the engine. `ranges` also gives the sizes of dynamic inputs that
            the engine is built for: smallest, most frequent, largest.
        backend: "tensorrt", "inductor", "eager", or "auto": TensorRT where the installed flavour supports the GPU, else
            Inductor where it can compile for it, else eager.
        ahead_of_time: build without a GPU (only TensorRT-RTX can). Save the engine, and load it where there is a GPU.
        strict_precision: refuse an engine whose ledger contradicts the plan or, unless `allow_unknown`, lists nodes
            that could not be found in the engine.
        on_failure: "error", or "fallback": when the builder fails and a remedy is known (decompose attention, keep the
            nodes in fp32), apply it and say so in `engine.record`.
        isolate: build in a separate process, so that a crash or a hang of the builder is only an error here. Without
            it, the build saves the start of that process, but a crash of the builder ends this process.
        build_timeout: seconds after which the builder process counts as hung; None waits for ever. Setting the engine
            up, which this process does, is not counted.
        cache: keep engines in the user's cache folder (True; see `CALIBCAST_CACHE`), in a folder, or not (False).
        cache_size: bytes that the cache may take; the least recently used engines are removed first.
        batches, transform: data as `calibrate` takes them. On a GPU the engine is run on up to two of these batches,
            or else on inputs made up from `ranges`. Its SQNR may be at most 6 dB below what its plan was proven to
            have. The results are in `engine.record["trial"]`. An engine from the cache that was judged by other data is
            judged again.
        reference: the fp32 program that the engine is then compared with; None: `mixed` with every node in fp32 that
            can be.
        carry_state: as in `calibrate`: run these batches as a sequence.
        settings: the backend's settings, by its own names; for TensorRT those of `torch_tensorrt.dynamo.compile`, such
            as `require_full_compilation`, `optimization_level`, `disable_tf32`, `torch_executed_ops`.

    Raises:
        BuildError: unknown backend or setting, a missing package, or a failure of the builder, with its nodes and a
            remedy.
        GateError: `strict_precision` refuses the engine (`report` has the rows).
    """
    require_program(mixed, "mixed", "Give what insert_casts(program, plan) returns, or any exported program.")
    _warn_of_written_inputs(mixed)
    found, why = chosen(backend, ahead_of_time)
    _log.info("backend %s (%s)", found.name, why)
    request = BuildRequest(
        program=mixed,
        plan=plan,
        ranges=ranges,
        settings=settings,
        ahead_of_time=ahead_of_time,
        on_failure=on_failure,
        isolate=isolate,
        build_timeout=build_timeout,
        cache=cache,
        cache_size=cache_size,
        progress=progress,
        reference=reference,
        carry_state=carry_state,
        batches=() if ahead_of_time or found.name == "eager" else _trial_batches(mixed, batches, transform),
    )
    built = found.build(request)
    if built.ledger.height:
        _log.info("ledger: %.1f%% of the planned nodes unknown", 100 * unknown_share(built.ledger))
    if strict_precision:
        require_precision(built.ledger, allow_unknown)
    return Engine(
        program=built.program,
        runtime=built.runtime,
        backend=found.name,
        why=why,
        plan=built.plan,
        ranges=ranges,
        settings=settings,
        versions=found.versions(),
        ledger=built.ledger,
        record=built.record,
    )


def _warn_of_written_inputs(program: ExportedProgram) -> None:
    written, names = mutated_inputs(program), program.graph_signature.user_inputs
    leaves = zip(signature_of(program).leaves, names, strict=True)
    if found := [leaf.name for leaf, name in leaves if isinstance(name, str) and name in written]:
        warnings.warn(
            f"the program writes to its inputs {', '.join(found)}: an engine computes with what it writes, and leaves "
            "the caller's tensors as they are. Return the new values too, or make them buffers of the model: an engine "
            "keeps those between calls.",
            stacklevel=3,
        )


def _trial_batches(
    program: ExportedProgram, batches: Iterable[Any], transform: Callable[[Any], Any] | None
) -> list[FlatInputs]:
    """Flat inputs of the first batches; empty where `batches` is empty."""
    first = list(islice(batches, MOST_TRIED))
    return [flat for _, _, flat in numbered(first, signature_of(program), transform)] if first else []
