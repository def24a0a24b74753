"""The precision plan: the type of each node, and every reason for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import polars as pl
import torch
from calibcast.calib.artifacts import load_json, parsed, save_json
from calibcast.calib.errors import ArtifactError, MismatchError, PlanError, known
from calibcast.calib.execution import require_program
from calibcast.calib.graph import dtype_name, is_measurable, module_path, op_name, tensor_values
from calibcast.calib.graph_digests import fingerprint, first_difference
from calibcast.calib.json_types import require_types
from calibcast.calib.number_text import percent
from calibcast.calib.program_digests import node_digests
from calibcast.passes.autocast_replay import ran_low
from calibcast.passes.low_types import LOW_TYPES
from calibcast.passes.node_types import kept_by_graph
from calibcast.passes.proof import Proof, RoundingSummary, as_rows
from calibcast.passes.regions import Candidate, candidates
from calibcast.passes.verdict import HIGH, KEPT, LOW, Verdict
from calibcast.passes.work import work_of
from torch import fx
from torch.export import ExportedProgram

_KIND = "plan"
_NOTES_SHOWN = 6
_NEARLY_ALL = 0.999  # of the work: `rescale` takes nothing for a gain of less than a thousandth
_OF_SIZE = frozenset({"headroom", "data_max"})  # rules that rescaling answers; bfloat16 has the range of fp32
_VERDICT = pl.Struct({"rule": pl.String, "reason": pl.String, "evidence": pl.Float64, "limit": pl.Float64})
SCHEMA: dict[str, Any] = {
    "node": pl.String,
    "op": pl.String,
    "module": pl.String,
    "precision": pl.String,
    "rule": pl.String,
    "reason": pl.String,
    "evidence": pl.Float64,
    "limit": pl.Float64,
    "verdicts": pl.List(_VERDICT),
    "work": pl.Int64,
}


@dataclass(frozen=True)
class Decision:
    """The decision on one node. `rule` is None when it is low; `verdicts` has those of all rules, the deciding one
    first.

    evidence, limit: the number that decided and its limit. For a low node: the largest magnitude seen and `data_max`,
    or where rounding was measured, what rounding costs there and the budget, in dB. work: floating-point operations
    at the exported sizes.
    """

    node: str
    op: str
    module: str
    precision: str
    rule: str | None
    reason: str
    evidence: float | None = None
    limit: float | None = None
    verdicts: tuple[Verdict, ...] = ()
    work: int = 0


# What a plan's file holds, by key.
_FILE: dict[str, Any] = {
    "low_precision_type": str,
    "settings": dict[str, Any],
    "notes": list[str],
    "masks": list[str] | None,
    "flips": dict[str, dict[str, float | None]],
    "budgets": dict[str, dict[str, float | None]],
    "rounding": RoundingSummary | None,
    "proof": Proof | None,
    "exponents": dict[str, int],
    "digests": dict[str, str],
    "decisions": list[Decision],
}


@dataclass(frozen=True)
class PrecisionPlan:
    """A type for each node of a program: `low_precision_type`, its exported type (`high`), or not ours to set (`kept`).

    decisions: one per `call_function` node, in graph order. digests: of the graph that it is for. settings: what
    `classify` was called with. notes: what a reader should know, such as weights that become inf or zero. masks: nodes
    in which calibration has seen mask values, which are saturated when they are cast; None without ranges. flips: by
    low type ("float16", "bfloat16") and node, the least `data_max` at which it is low, None where it never is; empty
    without ranges. budgets: likewise, the highest `min_sqnr_db` at which it is low; empty where rounding was not
    measured. rounding: what the measured edges predict for the plan. proof: what running it has shown; see `tune`.
    exponents: k by `node:output` of a rescaled program's tensors, which are stored as 2^-k times their true values.
    """

    decisions: tuple[Decision, ...]
    low_precision_type: torch.dtype
    digests: Mapping[str, str] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    masks: tuple[str, ...] | None = None
    flips: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict, repr=False)
    budgets: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict, repr=False)
    rounding: RoundingSummary | None = None
    proof: Proof | None = None
    exponents: Mapping[str, int] = field(default_factory=dict, repr=False)

    @cached_property
    def _by_node(self) -> dict[str, Decision]:
        return {decision.node: decision for decision in self.decisions}

    @property
    def fingerprint(self) -> str:
        """Digest of the graph that the plan is for."""
        return fingerprint(dict(self.digests))

    @property
    def low_precision_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that run in the low type, in graph order."""
        return tuple(d.node for d in self.decisions if d.precision == LOW)

    @property
    def high_precision_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that stay in their exported type, in graph order, without kept ones."""
        return tuple(d.node for d in self.decisions if d.precision == HIGH)

    @cached_property
    def frame(self) -> pl.DataFrame:
        """One row per node, with the columns of `SCHEMA`."""
        rows = [{**asdict(d), "verdicts": [asdict(v) for v in d.verdicts]} for d in self.decisions]
        return pl.DataFrame(rows, schema=SCHEMA)

    def __getitem__(self, node: str) -> Decision:
        """The decision on `node`. Raises PlanError for an unknown name, and suggests similar ones."""
        if node not in self._by_node:
            raise PlanError(f"the plan has no node {node!r}; {known(node, self._by_node)}")
        return self._by_node[node]

    def explain(self, node: str) -> str:
        """Why `node` has its type, in a sentence. Raises PlanError for an unknown name."""
        decision = self[node]
        place = f"{node} ({', '.join(part for part in (decision.op, decision.module) if part)})"
        if decision.precision == LOW:
            return f"{place} runs in {dtype_name(self.low_precision_type)}: {decision.reason}."
        if decision.precision == KEPT:
            return f"{place} is kept as it is: {decision.reason}."
        more = "".join(f" Also ({v.rule}): {v.reason}." for v in decision.verdicts[1:])
        return f"{place} stays in its exported type ({decision.rule}): {decision.reason}.{more}"

    def share(self) -> tuple[float, float]:
        """Share of the classified nodes, and of their work, that is low; NaN where there is none."""
        mine = [d for d in self.decisions if d.precision != KEPT]
        low = [d for d in mine if d.precision == LOW]
        work = sum(d.work for d in mine)
        nan = float("nan")
        return (len(low) / len(mine) if mine else nan, sum(d.work for d in low) / work if work else nan)

    @property
    def summary(self) -> str:
        """How many nodes have which type, in a sentence."""
        nodes, work = self.share()
        return (
            f"PrecisionPlan: {len(self.low_precision_nodes)} {dtype_name(self.low_precision_type)}, "
            f"{len(self.high_precision_nodes)} high, {sum(d.precision == KEPT for d in self.decisions)} kept; "
            f"{percent(nodes)} of nodes and {percent(work)} of work in low precision"
        )

    def __str__(self) -> str:
        counts = Counter((d.precision, d.rule or "") for d in self.decisions)
        order = {LOW: 0, HIGH: 1, KEPT: 2}
        lines = [self.summary, f"  {'precision':<10}{'rule':<24}{'nodes':>6}"]
        for (precision, rule), count in sorted(counts.items(), key=lambda item: (order[item[0][0]], -item[1])):
            lines.append(f"  {precision:<10}{rule:<24}{count:>6}")
        told = [f"  rounding: {self.rounding}"] if self.rounding is not None else []
        told += [f"  {self.proof}"] if self.proof is not None else []
        told += [f"  note: {note}" for note in self.notes[:_NOTES_SHOWN]]
        more = len(self.notes) - _NOTES_SHOWN
        told += [f"  and {more} more notes, in plan.notes"] if more > 0 else []
        return "\n".join(lines + told + self._advice())

    def _advice(self) -> list[str]:
        """What may bring more nodes into the low type."""
        loud = sum(d.precision == HIGH and d.rule in _OF_SIZE for d in self.decisions)
        done = self.exponents or self.share()[1] > _NEARLY_ALL
        fits = not loud or done or self.low_precision_type != torch.float16
        nodes = "1 node is" if loud == 1 else f"{loud} nodes are"
        return [] if fits else [f"  {nodes} high because values are large: `rescale` may make them fit"]

    def check(self, program: ExportedProgram) -> None:
        """Raise MismatchError unless the plan is for `program`."""
        difference = first_difference(node_digests(program), dict(self.digests))
        if difference is not None:
            raise MismatchError(f"this plan is for another program: {difference}. Classify this program.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        content = {
            "low_precision_type": dtype_name(self.low_precision_type),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "masks": None if self.masks is None else list(self.masks),
            "flips": {name: dict(nodes) for name, nodes in self.flips.items()},
            "budgets": {name: dict(nodes) for name, nodes in self.budgets.items()},
            "rounding": as_rows(self.rounding),
            "proof": as_rows(self.proof),
            "exponents": dict(self.exponents),
            "digests": dict(self.digests),
            "decisions": [asdict(decision) for decision in self.decisions],
        }
        save_json(path, _KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read a plan. Raises ArtifactError when the file is truncated, not a plan, or of a newer version."""
        content = load_json(path, _KIND)
        with parsed(path, _KIND):
            require_types(content, _FILE)
            decisions = tuple(
                Decision(**{**row, "verdicts": tuple(Verdict(**v) for v in row["verdicts"])})
                for row in content["decisions"]
            )
            unknown = {d.precision for d in decisions} - {LOW, HIGH, KEPT}
            if unknown:
                raise ArtifactError(f"{path}: unknown precision {sorted(unknown)[0]!r}; known are low, high and kept")
            strangers = [d.node for d in decisions if d.node not in content["digests"]]
            if strangers:
                raise ArtifactError(
                    f"{path} decides on node {strangers[0]!r}, which the graph that it is for does not have: it was "
                    "changed by hand, or is damaged. Make the plan again."
                )
            return cls(
                decisions=decisions,
                low_precision_type=LOW_TYPES[content["low_precision_type"]],
                digests=dict(content["digests"]),
                settings=dict(content["settings"]),
                notes=tuple(content["notes"]),
                masks=None if content["masks"] is None else tuple(content["masks"]),
                flips=dict(content.get("flips", {})),
                budgets=dict(content.get("budgets", {})),
                rounding=None if content.get("rounding") is None else RoundingSummary.loaded(content["rounding"]),
                proof=None if content.get("proof") is None else Proof.loaded(content["proof"]),
                exponents={name: int(k) for name, k in content.get("exponents", {}).items()},
            )

    @classmethod
    def from_types(cls, program: ExportedProgram) -> PrecisionPlan:
        """The plan that a program already implements: each node at its present type.

        Nodes with a floating-point tensor in fp16 or bf16 (the more frequent of the two) are low; those in fp32 high.
        """
        require_program(program)
        nodes = candidates(program)
        types = Counter(
            value.dtype
            for candidate in nodes
            for _, value in tensor_values(candidate.node)
            if not candidate.inside and value.dtype in LOW_TYPES.values()
        )
        low_type = max(types, key=types.__getitem__, default=torch.float16)
        decisions = tuple(_as_typed(candidate, low_type) for candidate in nodes)
        return cls(decisions, low_type, node_digests(program), {"from_types": True})

    @classmethod
    def from_autocast(
        cls, program: ExportedProgram, low_precision_type: torch.dtype = torch.float16, device_type: str = "cuda"
    ) -> PrecisionPlan:
        """The plan that `torch.autocast(device_type, low_precision_type)` would run, for models trained under it.

        The program's operators are run under autocast on fake tensors: no data and no GPU are needed. Nodes that any
        plan keeps (integers, regions, stated types) are kept here, too. A node that cannot run low in a graph with
        casts is high: its kernel refuses, or it shares storage with a node that stays.
        """
        require_program(program)
        low = ran_low(program, low_precision_type, device_type)
        nodes = candidates(program)
        stays = kept_by_graph(nodes, low, low_precision_type)
        decisions = tuple(_as_autocast(candidate, candidate.name in low, stays) for candidate in nodes)
        settings = {"from_autocast": device_type}
        return cls(decisions, low_precision_type, node_digests(program), settings)


def _as_autocast(candidate: Candidate, is_low: bool, stays: Mapping[str, Verdict]) -> Decision:
    node, kept, stay = candidate.node, candidate.kept, stays.get(candidate.name)
    place: dict[str, Any] = {"node": candidate.name, "op": op_name(node.target), "module": module_path(node)}
    if kept is not None:
        return Decision(**place, work=work_of(node), precision=KEPT, rule=kept.rule, reason=kept.reason)
    if stay is not None:
        reason = f"torch.autocast runs it in the low type, but {stay.reason}"
        return Decision(
            **place, work=work_of(node), precision=HIGH, rule=stay.rule, reason=reason, verdicts=(stay,)
        )  # fmt: skip
    precision, rule = (LOW, None) if is_low else (HIGH, "autocast")
    reason = f"torch.autocast runs it in {'the low type' if is_low else 'float32'}"
    return Decision(**place, work=work_of(node), precision=precision, rule=rule, reason=reason)


def _as_typed(candidate: Candidate, low_type: torch.dtype) -> Decision:
    node = candidate.node
    place: dict[str, Any] = {
        "node": candidate.name,
        "op": op_name(node.target),
        "module": module_path(node),
        "work": work_of(node),
    }
    outputs, inputs = _float_types(node), set().union(*(map(_float_types, node.all_input_nodes)))
    # Input types count, too: `mean(dtype=torch.float16)` reads fp32, and would be another mean if it read fp16.
    present = outputs | inputs
    kept = candidate.kept
    if kept is not None and kept.rule != "already_low":
        return Decision(**place, precision=KEPT, rule=kept.rule, reason=kept.reason)
    if present == {low_type}:
        return Decision(**place, precision=LOW, rule=None, reason=f"the program has it in {dtype_name(low_type)}")
    if (outputs or inputs) == {torch.float32}:
        return Decision(**place, precision=HIGH, rule="present_type", reason="the program has it in float32")
    types = " and ".join(sorted(map(dtype_name, present)))
    return Decision(**place, precision=KEPT, rule="present_type", reason=f"the program has it in {types}")


def _float_types(node: fx.Node) -> set[torch.dtype]:
    return {value.dtype for _, value in tensor_values(node) if is_measurable(value.dtype)}
