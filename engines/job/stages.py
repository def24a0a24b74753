"""The stages of a job: what each depends on, and what it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from calibcast.calib.artifacts import load_program, save_program
from calibcast.calib.checkpoint import Checkpoint, merge_checkpoints
from calibcast.calib.errors import BatchError, GateError
from calibcast.calib.graph_digests import fingerprint
from calibcast.calib.number_text import counted
from calibcast.calib.program_digests import node_digests
from calibcast.calib.ranges import RangeTable
from calibcast.calib.sequences import NewSequence
from calibcast.engines.backends import chosen
from calibcast.engines.building import MOST_TRIED, build
from calibcast.engines.io_names import name_sizes, size_names
from calibcast.engines.job.context import JobContext
from calibcast.engines.job.errors import JobError
from calibcast.engines.job.feed import Feeding, feed
from calibcast.engines.job.folder import (
    EARLY,
    ENGINE,
    FITTED,
    FITTED_RANGES,
    MIXED,
    PLAN,
    RANGES,
)
from calibcast.engines.job.logs import tell
from calibcast.engines.job.measuring import Task, counts, measure_shard
from calibcast.engines.job.messages import take, tell_all
from calibcast.engines.job.openers import code_digest, fingerprints
from calibcast.engines.job.progress import Progress
from calibcast.engines.job.ranks import Ranks
from calibcast.engines.job.settling import early_part, settling
from calibcast.engines.job.shares import Share
from calibcast.engines.job.sources import Done
from calibcast.engines.job.stage import Stage, plain_settings
from calibcast.engines.job.trust import DataReport, check_share
from calibcast.engines.job.verify_stage import verify_stage
from calibcast.engines.locations import load_function
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.plan import PrecisionPlan
from calibcast.passes.rescaling.checking import MOST_CHECKED
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.tuning import tune
from torch.export import ExportedProgram


@dataclass(frozen=True)
class JobRun(JobContext):
    """A run of a job, with its stages."""

    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        verification = () if self.held_out is None else (verify_stage(self, self.held_out),)
        return (self._calibrate(), self._plan(), self._cast(), self._build(), *verification)

    def _calibrate(self) -> Stage:
        job = self.file.job
        settings = {
            **plain_settings(job.calibration, "histogram", "on_nonfinite", "device", "rounding_batches", "carry_state"),
            **plain_settings(job.limits, "on_nonfinite_inputs"),
            "max_batches": job.data.max_batches,
            "held_out_share": self.calibration_share.held_out_share,
        }
        inputs = {**self.model_inputs, **fingerprints(self.file, job.data)}
        return Stage("calibrate", (RANGES, EARLY), (), inputs, settings, self._measure, self._judge_data)

    def task(self, made_of: Mapping[str, str]) -> Task:
        """This process's part of the calibration."""
        job = self.file.job
        data, inputs = self.opened(job.data, self.ranks)
        path = self.folder.checkpoint(self.ranks.rank, self.ranks.world)
        name = path.relative_to(self.folder.path).as_posix()
        store = self.store
        if store is not None:
            store.fetch(name)
        device = f"cuda:{self.ranks.local}" if job.calibration.device == "cuda" else job.calibration.device
        return Task(
            self.program, data.batches, self.calibration_share, inputs, job.calibration, job.limits, made_of, path,
            device, (lambda _: None) if store is None else (lambda _: store.put(name)),
        )  # fmt: skip

    def made_of(self) -> dict[str, str]:
        """Fingerprints of everything that the statistics of a shard depend on."""
        stage = self._calibrate()
        settings = {name: json.dumps(value) for name, value in stage.settings.items()}
        return {**stage.inputs, **settings, "number of processes": str(self.ranks.world)}

    def _measure(self) -> dict[str, Any]:
        made_of = self.made_of()
        task = self.task(made_of)
        self.refuse_nothing(task.batches.length)
        tell_all(self.ranks, json.dumps(made_of).encode())
        own = measure_shard(task, self.signals, self.bar)
        others = [
            Checkpoint.from_bytes(take(rank), self.folder.checkpoint(rank, self.ranks.world))
            for rank in range(1, self.ranks.world)
        ]
        parts = [own, *others]
        report = DataReport.merged(DataReport.from_json(part.notes["report"]) for part in parts)
        check_share(report, self.file.job.limits)
        table = merge_checkpoints(parts).table()
        if not table.calibration.batches:
            raise BatchError(f"of {report.batches} batches none could be measured: {'; '.join(report.lines())}")
        table.save(self.folder.path / RANGES)
        early = [part for part in map(early_part, parts) if part is not None]
        if early:
            merge_checkpoints(early).table().save(self.folder.path / EARLY)
        else:
            (self.folder.path / EARLY).unlink(missing_ok=True)
        return {"summary": str(table), "batches": table.calibration.batches, "report": report.to_json()}

    def refuse_nothing(self, length: int | None) -> None:
        """Check before the work starts that there is a batch to calibrate on, and one to verify with.

        length: number of batches of [data]; None where it is unknown. Raises JobError where there is none, and for
        [held_out] data that cannot be opened or whose columns do not feed the model.
        """
        if self.file.job.held_out is not None:
            held_out, _ = self.opened(self.file.job.held_out, Ranks())
            if held_out.batches.length == 0:
                raise JobError(f"[held_out]: {held_out.about}: there is no batch to verify with")
        if length is None:
            return
        share = self.calibration_share
        held = share.held_out_share
        if held > 0 and not counts(length, Share(held, True))[1]:
            raise JobError(
                f"of {length} batches none is held out by held_out_share = {held:g}: make batch_size smaller or the "
                "share larger, or give [held_out]"
            )
        if not counts(length, share)[1]:
            raise JobError(f"the data have {length} batches, and none of them is left to calibrate on")

    def _judge_data(self, result: Mapping[str, Any]) -> None:
        report = DataReport.from_json(result["report"])
        for line in report.lines():
            tell(f"data: {line}", 30, event="data")
        check_share(report, self.file.job.limits)

    def _plan(self) -> Stage:
        settings = plain_settings(self.file.job.plan)
        code = {f"rule {rule}": code_digest(self.file, rule) for rule in self.file.job.plan.rules}
        inputs = {**self.model_inputs, **code}
        made = (PLAN, *((FITTED, FITTED_RANGES) if self.file.job.plan.rescale == "auto" else ()))
        return Stage("plan", made, ("calibrate",), inputs, settings, self._decide, self._judge_settling)

    def _decide(self) -> dict[str, Any]:
        table = RangeTable.load(self.folder.path / RANGES)
        classified = self._classified(table)
        if self.file.job.plan.rescale == "off":
            plan, told = self._proven(self.program, table) or classified, None
        else:
            plan, told = self._fitted(table)
        plan.save(self.folder.path / PLAN)
        proof = "" if plan.proof is None else f"; {plan.proof}"
        summary = f"{plan.summary}{proof}"
        result: dict[str, Any] = {"summary": summary, "settling": None, "rescaling": told}
        if (self.folder.path / EARLY).exists():
            early = RangeTable.load(self.folder.path / EARLY)
            found = settling(early, table, self._classified(early), classified)
            result |= {"settling": found.to_json(), "settled": str(found)}
        return result

    def _fitted(self, table: RangeTable) -> tuple[PrecisionPlan, str]:
        """Rescale the program, and write it with its ranges. Returns its plan, and what was done as text."""
        feeding, device = self._calibration_batches(MOST_CHECKED, "rescale")
        fitted = rescale(
            self.program, table, dataloader=feeding, transform=feeding.inputs, device=device,
            carry_state=self.file.job.calibration.carry_state, **self._arguments,
        )  # fmt: skip
        save_program(fitted.program, self.folder.path / FITTED)
        fitted.ranges.save(self.folder.path / FITTED_RANGES)
        tell(str(fitted), event="rescaling", changed=fitted.changed)
        plan = self._proven(fitted.program, fitted.ranges)
        return plan or classify(fitted.program, fitted.ranges, **self._arguments), str(fitted)

    def _classified(self, table: RangeTable) -> PrecisionPlan:
        return classify(self.program, table, **self._arguments)

    @property
    def _arguments(self) -> dict[str, Any]:
        settings = self.file.job.plan
        rules = [load_function(self.file.function(rule)) for rule in settings.rules]
        return {**settings.model_dump(exclude={"rules", "rescale", "prove_batches"}), "rules": rules}

    @property
    def _planned(self) -> ExportedProgram:
        """The program that the plan belongs to."""
        return self.program if self.file.job.plan.rescale == "off" else load_program(self.folder.path / FITTED)

    @property
    def _planned_ranges(self) -> RangeTable:
        return RangeTable.load(self.folder.path / (RANGES if self.file.job.plan.rescale == "off" else FITTED_RANGES))

    def _proven(self, program: ExportedProgram, table: RangeTable) -> PrecisionPlan | None:
        """The plan, run on calibration batches and mended; None where that was not asked for, or rounding was not
        measured.

        Raises BudgetError, a GateError, where no plan meets the budget.
        """
        most = self.file.job.plan.prove_batches
        if not table.rounding.height or not most:
            return None
        feeding, device = self._calibration_batches(most, "prove")
        return tune(
            program, table, feeding, transform=feeding.inputs, device=device,
            carry_state=self.file.job.calibration.carry_state, **self._arguments,
        )  # fmt: skip

    def _calibration_batches(self, most: int, name: str) -> tuple[Feeding, str | None]:
        """The first calibration batches, and the device to run them on."""
        job = self.file.job
        data, inputs = self.opened(job.data, Ranks())
        share = replace(self.calibration_share, most=min(most, job.data.max_batches or most), rank=0, world=1)
        total = counts(data.batches.length, share)[0]
        items = feed(data.batches.read(share, Done()), inputs, self.signature)
        feeding = Feeding(items, self.signature, job.limits, Progress(name, total, bar=self.bar), total)
        return feeding, f"cuda:{self.ranks.local}" if job.calibration.device == "cuda" else job.calibration.device

    def _judge_settling(self, result: Mapping[str, Any]) -> None:
        found, limits = result["settling"], self.file.job.limits
        if found is None:
            tell("data: too few batches to say whether the ranges have settled", event="data")
            return
        unsettled = bool(found["growing"] or found["moved"])
        tell(f"data: {result['settled']}", 30 if unsettled else 20, event="settling", **found)
        share = found["growing"] / max(found["tensors"], 1)
        if limits.max_growing_share is not None and share > limits.max_growing_share:
            raise GateError(
                f"the gate says no: {result['settled']}; limits.max_growing_share allows "
                f"{100 * limits.max_growing_share:.3g}% of the tensors. Calibrate on more data."
            )
        if limits.max_moved_decisions is not None and len(found["moved"]) > limits.max_moved_decisions:
            raise GateError(
                f"the gate says no: {result['settled']}; limits.max_moved_decisions allows "
                f"{limits.max_moved_decisions}. Calibrate on more data."
            )

    def _cast(self) -> Stage:
        inputs = {**self.model_inputs, "torch": torch.__version__}
        return Stage(
            "cast", (MIXED,), ("plan",), inputs, plain_settings(self.file.job.build, "keep_io_types"), self._insert
        )

    def _insert(self) -> dict[str, Any]:
        plan = PrecisionPlan.load(self.folder.path / PLAN)
        mixed = insert_casts(self._planned, plan, keep_io_types=self.file.job.build.keep_io_types)
        save_program(mixed, self.folder.path / MIXED)
        casts = len(node_digests(mixed)) - len(node_digests(self.program))
        return {
            "summary": f"{counted(casts, 'node')} more than the exported program",
            "program": fingerprint(node_digests(mixed)),
        }

    def _build(self) -> Stage:
        asked = self.file.job.build
        settings = {
            name: v for name, v in plain_settings(asked).items() if name not in {"keep_io_types", "build_timeout"}
        }
        backend, _ = chosen(asked.backend, asked.ahead_of_time)
        inputs = {"backend": json.dumps([backend.name, backend.versions()], sort_keys=True)}
        return Stage("build", (ENGINE,), ("calibrate", "plan", "cast"), inputs, settings, self._engine)

    def _engine(self) -> dict[str, Any]:
        settings, folder = self.file.job.build, self.folder.path
        mixed = load_program(folder / MIXED)
        name_sizes(mixed, size_names(self.program))
        options = settings.model_dump(exclude={"keep_io_types", "backend", "settings"})
        engine = build(
            mixed, PrecisionPlan.load(folder / PLAN), self._planned_ranges,
            settings.backend, progress=self.bar, reference=self.program, batches=self._to_try(),
            carry_state=self.file.job.calibration.carry_state, **options, **settings.settings,
        )  # fmt: skip
        engine.save(folder / ENGINE)
        return {"summary": f"backend {engine.backend} ({engine.why})", "backend": engine.backend}

    def _to_try(self) -> list[Any]:
        """Calibration batches for the trial after the build; empty where there is none."""
        asked = self.file.job.build
        if asked.ahead_of_time or chosen(asked.backend)[0].name == "eager":
            return []
        data, inputs = self.opened(self.file.job.data, Ranks())
        share = replace(self.calibration_share, rank=0, world=1)
        items = feed(data.batches.read(share, Done()), inputs, self.signature)
        first = [item for item in islice(items, MOST_TRIED) if item.error is None]
        return [NewSequence(item.inputs) if item.flat.begins else item.inputs for item in first]
