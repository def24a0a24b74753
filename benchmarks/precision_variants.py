"""What `precision_latency.py` compares, and how one network is measured in all of them."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

VARIANTS = (
    "eager fp32",
    "eager TF32",
    "autocast fp16",
    "compile fp32",
    "compile autocast fp16",
    "TensorRT fp32",
    "TensorRT whole-half",
    "peer autocast fp16",
    "calibcast fp16",
    "calibcast bf16",
    "calibcast fp16 by rules",
)
# The same cast graphs through AOTInductor (`backend="inductor"`): asked for by `--inductor`, as compiling takes long.
INDUCTOR = ("Inductor fp32", "Inductor whole-half", "calibcast fp16 by Inductor")
# "by rules": the plan without evidence from rounding (data_max 512); else what `tune` proves for the default budget.
ENGINES = ("TensorRT fp32", "TensorRT whole-half", "calibcast fp16", "calibcast bf16", "calibcast fp16 by rules")
ENGINES += INDUCTOR
_BURST = 0.04  # seconds of calls in one turn, about
Run = Callable[..., Any]


@dataclass
class Prepared:
    """A variant that is ready to run, or why it is not."""

    run: Run | None
    build_seconds: float | None = None
    half_share: float | None = None
    note: str = ""
    times: list[float] = field(default_factory=list)


class HalfError(Exception):
    """A model cannot be made half as a whole."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions of eager PyTorch."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Network:
    """One network with everything that its variants are made from."""

    def __init__(self, name: str, device: str) -> None:
        from benchmarks.engine_networks import subject

        self.device = device
        self.subject = subject(name, device)
        self.inputs = self.subject.held_out[0]
        with torch.no_grad(), tf32(False):
            self.program = torch.export.export(self.subject.model, self.inputs)
            self.reference = [self.subject.model(*batch) for batch in self.subject.held_out]

    def prepared(self, variants: Sequence[str], doing: Callable[[str], None]) -> dict[str, Prepared]:
        """Every variant, ready or with what went wrong. Engines are built at once, each in a process of its own."""
        from calibcast.calib import calibrate

        model, found = self.subject.model, dict[str, Prepared]()
        with tf32(False):
            self.ranges = calibrate(self.program, self.subject.calibration, progress=False)
        # Export and cast insertion change global state of torch, so only the waiting for builders is done in threads.
        works = {variant: self._cast_or_why(variant) for variant in variants if variant in ENGINES}
        with ThreadPoolExecutor(max_workers=max(1, len(works))) as pool:
            building = {
                variant: pool.submit(self._engine, variant, *work)
                for variant, work in works.items() if not isinstance(work, Prepared)
            }  # fmt: skip
            found |= {variant: work for variant, work in works.items() if isinstance(work, Prepared)}
            # Engines last: what is waited for while builders work costs nothing.
            for variant in sorted(variants, key=lambda v: v in building):
                doing(variant)
                if building and "compile" in variant:
                    time.sleep(2)  # let the builders have their programs first: compiling holds up who saves one
                if variant in found:
                    continue
                if variant in building:
                    found[variant] = building[variant].result()
                elif variant == "peer autocast fp16":
                    found[variant] = _tried(self._peer)
                elif "compile" in variant:
                    found[variant] = _tried(lambda v=variant: self._compiled(v))
                else:
                    found[variant] = Prepared(_with_autocast(model) if "autocast" in variant else model)
        return {variant: found[variant] for variant in variants}

    def _compiled(self, variant: str) -> Prepared:
        start = time.perf_counter()
        torch._dynamo.reset()
        compiled = torch.compile(self.subject.model)
        run = _with_autocast(compiled) if "autocast" in variant else compiled
        from calibcast.calib.pt2.serialiser import SERIALISING

        with SERIALISING, torch.no_grad(), tf32(False):
            run(*self.inputs)
        return Prepared(run, time.perf_counter() - start)

    def _cast(self, variant: str) -> tuple[Any, Any, float]:
        """The program that an engine variant is built from, its plan or None, and the seconds that it took."""
        from calibcast.calib.rounding_table import empty_rounding
        from calibcast.passes import classify, insert_casts, tune

        start, plan, program = time.perf_counter(), None, self.program
        if variant.endswith("whole-half"):
            program = self._whole_half()
        elif not variant.endswith(" fp32"):
            low_type = torch.float16 if "fp16" in variant else torch.bfloat16
            if "by rules" in variant:
                plan = classify(self.program, replace(self.ranges, rounding=empty_rounding()), low_type)
            else:
                with tf32(False):
                    plan = tune(self.program, self.ranges, self.subject.calibration, low_precision_type=low_type)
            program = insert_casts(self.program, plan)
        return program, plan, time.perf_counter() - start

    def _whole_half(self) -> Any:
        """The model's own `half()`. Raises HalfError where that does not run, as of one that makes angles in fp32."""
        try:
            with torch.no_grad():
                return torch.export.export(copy.deepcopy(self.subject.model).half(), _halved(self.inputs))
        except Exception as error:  # whatever the model's own code raises
            raise HalfError(f"its half() does not run: {str(error).strip().splitlines()[0]}") from error

    def _cast_or_why(self, variant: str) -> tuple[Any, Any, float] | Prepared:
        """`_cast`; a budget that cannot be met is a row, and the other variants are measured all the same."""
        from calibcast.calib.errors import PlanError

        try:
            return self._cast(variant)
        except PlanError as error:
            return Prepared(None, note=f"no plan: {str(error).splitlines()[0]}")
        except HalfError as error:
            return Prepared(None, note=str(error))

    def _engine(self, variant: str, program: Any, plan: Any, seconds: float) -> Prepared:
        return _tried(lambda: self._built(variant, program, plan, seconds))

    def _built(self, variant: str, program: Any, plan: Any, seconds: float) -> Prepared:
        from calibcast.engines import build

        start = time.perf_counter() - seconds
        inductor = variant in INDUCTOR
        settings = {"device": self.device} if inductor else {"ahead_of_time": self.device == "cpu"}
        engine = build(
            program,
            plan,
            self.ranges if plan is not None else None,
            backend="inductor" if inductor else "tensorrt",
            on_failure="error" if plan is None else "fallback",
            progress=False,
            **settings,
        )
        record = engine.record
        share = record["half_layers"] / record["typed_layers"] if record.get("typed_layers") else None
        whole = variant.endswith("whole-half")
        run = (lambda *inputs: engine(*_halved(inputs))) if whole else engine
        return Prepared(run, time.perf_counter() - start, share, _note(engine, "calibcast" in variant))

    def _peer(self) -> Prepared:
        import torch_tensorrt

        start = time.perf_counter()
        with torch.no_grad(), tf32(False):
            program = torch.export.export(self.subject.model, self.inputs)
        explicit = {"use_explicit_typing": True} if torch_tensorrt.__version__ < "2.14" else {}
        module = torch_tensorrt.dynamo.compile(
            program,
            arg_inputs=self.inputs,
            enable_autocast=True,
            autocast_low_precision_type=torch.float16,
            autocast_calibration_dataloader=self.subject.calibration[:1],
            min_block_size=1,
            **explicit,
        )
        return Prepared(module, time.perf_counter() - start)


def _note(engine: Any, planned: bool) -> str:
    from calibcast.engines.ledger.ledger_text import contradictions, unknown_share

    parts = []
    if planned:
        parts.append(f"{len(engine.plan.low_precision_nodes)} low, {len(engine.plan.high_precision_nodes)} high")
        if engine.plan.proof is not None:
            parts.append(f"proven {engine.plan.proof.sqnr_db:.1f} dB")
        parts.append(f"{100 * unknown_share(engine.ledger):.0f}% unknown")
        parts.append(f"{contradictions(engine.ledger).height} contradict")
    parts += [f"remedy: {remedy.split(', as ')[0]}" for remedy in engine.record.get("remedies", ())]
    if engine.record.get("set_by_plan"):
        parts.append(engine.record["set_by_plan"])
    outside = engine.record.get("fallback_to_pytorch")
    if outside:
        parts.append(f"{len(outside)} nodes in PyTorch")
    return "; ".join(parts)


def _tried(make: Callable[[], Prepared]) -> Prepared:
    start = time.perf_counter()
    try:
        return make()
    except Exception as error:  # whatever a builder raises is a row
        text = f"fails: {type(error).__name__}: {str(error).strip()[:300]}"
        return Prepared(None, time.perf_counter() - start, note=text)


def _halved(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs)


def _with_autocast(run: Run) -> Run:
    def under(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, dtype=torch.float16):
            return run(*inputs)

    return under


def measure(name: str, variants: Sequence[str], device: str, rounds: int, rows: Path) -> None:
    """Prepare and measure one network, writing every row as soon as it is known."""

    def append(row: dict[str, Any]) -> None:
        with rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"network": name, **row}) + "\n")

    torch.set_grad_enabled(False)
    append({"variant": "", "doing": "eager fp32"})
    network = Network(name, device)
    doc = " ".join((_documented().get(name) or name).split())
    append({"variant": "", "title": f"{name}: {doc}", "doing": ""})
    found = network.prepared(variants, lambda variant: append({"variant": "", "doing": variant}))
    errors: dict[str, dict[str, Any]] = {}
    for variant, prepared in found.items():
        append({"variant": "", "doing": variant})
        if prepared.run is not None:
            errors[variant] = _error(network, variant, prepared)
        append(_row(variant, prepared, errors.get(variant, {})))
    running = {variant: prepared for variant, prepared in found.items() if prepared.run is not None}
    calls = {variant: _calls(network, variant, prepared) for variant, prepared in running.items()}
    for _ in range(rounds):
        for variant, prepared in running.items():
            prepared.times.append(_timed(network, variant, prepared, calls[variant]))
    for variant, prepared in running.items():
        append(_row(variant, prepared, errors[variant]))


def _documented() -> dict[str, str]:
    """What each network is, by name."""
    from benchmarks.engine_networks import SUBJECTS

    return {name: (make.__doc__ or "").strip() for name, make in SUBJECTS.items()}


def _row(variant: str, prepared: Prepared, error: dict[str, Any]) -> dict[str, Any]:
    row = {"variant": variant, "note": prepared.note, **error}
    row |= {"build_seconds": prepared.build_seconds, "half_share": prepared.half_share}
    if prepared.times:
        row |= {"ms": statistics.median(prepared.times), "ms_min": min(prepared.times), "ms_max": max(prepared.times)}
    return row


def _error(network: Network, variant: str, prepared: Prepared) -> dict[str, Any]:
    """Relative L2, SQNR and what is not finite, over the held-out batches; what fails to run is a note."""
    from calibcast.engines.judging.metrics import OutputError

    assert prepared.run is not None
    total = OutputError("all")
    try:
        with tf32(variant == "eager TF32"):
            for index, (batch, reference) in enumerate(zip(network.subject.held_out, network.reference, strict=True)):
                outputs = pytree.tree_leaves(prepared.run(*batch))
                for ours, theirs in zip(outputs, pytree.tree_leaves(reference), strict=True):
                    total.update(ours.float().to(theirs.device), theirs, index)
    except Exception as error:
        failed = f"does not run: {type(error).__name__}: {str(error).strip()[:300]}"
        prepared.run, prepared.note = None, "; ".join(part for part in (failed, prepared.note) if part)
        return {}
    return {"rel_l2": total.rel_l2, "sqnr_db": min(total.sqnr_db, 999.0), "nonfinite": total.only_engine}


def _calls(network: Network, variant: str, prepared: Prepared) -> int:
    for _ in range(3):
        _timed(network, variant, prepared, 2)  # warm up
    return max(2, min(100, int(_BURST / max(1e-6, _timed(network, variant, prepared, 2) / 1000))))


def _timed(network: Network, variant: str, prepared: Prepared, calls: int) -> float:
    """Milliseconds a call."""
    assert prepared.run is not None
    with tf32(variant == "eager TF32"):
        if network.device == "cpu":
            start = time.perf_counter()
            for _ in range(calls):
                prepared.run(*network.inputs)
            return 1000 * (time.perf_counter() - start) / calls
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            prepared.run(*network.inputs)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls
