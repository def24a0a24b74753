"""What follows from a build that failed: the nodes that it failed at, the remedies, and the advice to the user."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from calibcast.calib.graph import argument_of, base_op, dtype_name, module_path
from calibcast.calib.operators import ATTENTION, CONVERTS
from calibcast.engines.tensorrt.builder.isolation import BUILDING, CONVERTING, LOADING, RUNNING, WRITING, BuilderError
from calibcast.engines.tensorrt.region_search import computing_nodes, described
from calibcast.engines.tensorrt.widening import widenable
from calibcast.passes.plan import Decision, PrecisionPlan
from calibcast.passes.verdict import HIGH, Verdict
from torch import fx
from torch.export import ExportedProgram

FAILED = "the builder failed on it in the low type"
_SHOWN = 6
# A region of more nodes than this is too large to point a user at.
_MOST = 64


@dataclass(frozen=True)
class Remedy:
    """Something to try after a failure: other settings, or nodes to keep in fp32 (`widen`)."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    widen: tuple[str, ...] = ()


def attention_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The attention nodes of a program, in graph order."""
    return [node for node in program.graph.nodes if base_op(node.target) in ATTENTION]


def region_of(failure: BuilderError, program: ExportedProgram, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the nodes that a failure points at: the node being converted, else the nodes whose layers it names, else
    attention that is not decomposed, which builders fail at most often. () where the failure points at nothing."""
    names = {node.name for node in program.graph.nodes if node.op == "call_function"}
    if failure.stage == CONVERTING and failure.node in names:
        return (failure.node,)
    said = f"{failure.message}\n{failure.log}"
    named = [str(layer["node"]) for layer in failure.layers if layer["node"] in names and str(layer["name"]) in said]
    found = set(named)
    if 0 < len(found) <= _MOST:
        return tuple(node.name for node in program.graph.nodes if node.name in found)
    fused = not settings.get("decompose_attention")
    if fused and failure.stage in {BUILDING, WRITING} and failure.kind not in {"memory", "unsupported"}:
        return tuple(node.name for node in _suspects(program))
    return ()


def _suspects(program: ExportedProgram) -> list[fx.Node]:
    """Attention nodes in another type than their neighbours, else all attention nodes."""
    attention = attention_nodes(program)
    mixed = [node for node in attention if _between_casts(node)]
    return mixed or attention


def _between_casts(node: fx.Node) -> bool:
    return any(base_op(near.target) in CONVERTS for near in [*node.all_input_nodes, *node.users])


def remedies(failure: BuilderError, program: ExportedProgram, settings: Mapping[str, Any]) -> list[Remedy]:
    """What can be tried after `failure`, the least costly first; empty when nothing is known to help."""
    if failure.kind in {"memory", "hang"}:
        return []
    region = region_of(failure, program, settings)
    found: list[Remedy] = []
    has_attention = any(node.name in region for node in attention_nodes(program))
    if has_attention and not settings.get("decompose_attention"):
        found.append(Remedy("decompose attention (decompose_attention=True)", {"decompose_attention": True}))
    able = {node.name for node in widenable(program)}
    low = tuple(name for name in region if name in able)
    if low:
        found.append(Remedy(f"keep {_listed(low)} in fp32", widen=low))
    return found + _by_operator(program, low)


def _by_operator(program: ExportedProgram, low: Sequence[str]) -> list[Remedy]:
    """Remedies that keep all nodes of an operator in fp32, the rarest operator first: where a builder names some nodes,
    others of the same operator often fail too."""
    operators = nodes_alike(program, lambda node: base_op(node.target))
    named = sorted((names for names in operators if set(names) & set(low)), key=len)
    return [
        Remedy(f"keep all {len(names)} nodes like {names[0]} in fp32", widen=names)
        for names in named
        if set(names) - set(low)
    ]


def nodes_alike(program: ExportedProgram, kind: Callable[[fx.Node], Hashable]) -> list[tuple[str, ...]]:
    """Names of the nodes that can be kept in fp32, grouped by `kind`, in graph order."""
    alike, able = dict[Hashable, list[str]](), widenable(program)
    for node in program.graph.nodes:
        if node in able:
            alike.setdefault(kind(node), []).append(node.name)
    return [tuple(names) for names in alike.values()]


def advice(failure: BuilderError, program: ExportedProgram, settings: Mapping[str, Any]) -> str:
    """The error that a user sees: what failed, where, and what to do."""
    region = region_of(failure, program, settings)
    place = f" at {_described(region, program)}" if region else f" while {failure.stage or 'starting'}"
    if not region and failure.stage == RUNNING and (inside := computing_nodes(program)):
        place += f", somewhere in {described(inside)}"  # only more builds would show where
    options = remedies(failure, program, settings)
    if options:
        what = ", or ".join(option.text for option in options)
        return f"{failure.message}{place}. Remedy: {what}; on_failure='fallback' does so by itself."
    if failure.kind == "memory":
        what = (
            "build with smaller sizes (ranges= whose calibration saw smaller batches), workspace_size=, or more memory"
        )
    elif failure.kind == "hang":
        what = "give it more time (build_timeout=), or a lower optimization_level="
    elif failure.stage == LOADING:
        what = (
            "if the program has an operator of your own, define it with torch.library.custom_op in a module that can "
            "be imported, or pass isolate=False"
        )
    elif failure.stage == CONVERTING and failure.node:
        what = "keep it out with torch_executed_ops={...}; on_failure='fallback' leaves it in PyTorch by itself"
    elif failure.kind == "unsupported":
        what = "leave it in PyTorch with torch_executed_ops={...}, and do not pass require_full_compilation=True"
    else:
        what = "keep operators out with torch_executed_ops={...}, or leave more nodes in fp32 with nodes_to_exclude="
    return f"{failure.message}{place}. Remedy: {what}."


def _described(names: Sequence[str], program: ExportedProgram) -> str:
    nodes = {node.name: node for node in program.graph.nodes}
    shown = [
        f"{name} ({', '.join(part for part in (base_op(nodes[name].target), module_path(nodes[name])) if part)})"
        for name in names[:_SHOWN]
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"node{'s' if len(names) > 1 else ''} {', '.join(shown)}{more}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def raised(plan: PrecisionPlan | None, reasons: Mapping[str, str]) -> PrecisionPlan | None:
    """The plan with the nodes of `reasons` kept high, because the builder does not take them in the low type."""
    if plan is None or not reasons:
        return plan

    def decision(d: Decision) -> Decision:
        if d.node not in reasons:
            return d
        verdict = Verdict("builder", reasons[d.node])
        verdicts = (verdict, *d.verdicts)
        return replace(
            d, precision=HIGH, rule="builder", reason=verdict.reason, evidence=None, limit=None, verdicts=verdicts
        )

    flips = {kind: dict(by_node) for kind, by_node in plan.flips.items()}
    own = flips.get(dtype_name(plan.low_precision_type), {})
    own.update({name: None for name in reasons if name in own})
    return replace(plan, decisions=tuple(map(decision, plan.decisions)), flips=flips)


def settings_for(plan: PrecisionPlan | None, program: ExportedProgram, is_rtx: bool) -> tuple[dict[str, Any], str]:
    """Settings that the plan's verdicts and the program's types require, and why.

    - Attention that is masked and computes in fp32 is decomposed for TensorRT-RTX: fused, its results are wrong.
    - Attention that stays high between low nodes is decomposed for TensorRT-RTX, whose builder (1.6) crashes on it.
    - A node that was forced low although something inside it may overflow gets fp32 accumulation. Attention is then
      decomposed as well, since the setting reaches the values inside it only then.
    """
    found: dict[str, Any] = {}
    reasons = []
    decisions = () if plan is None else plan.decisions
    forced = [d.node for d in decisions if d.precision == "low" and any(v.rule == "interior" for v in d.verdicts)]
    if forced:
        found["use_fp32_acc"] = True
        reasons.append(f"use_fp32_acc: {_listed(forced)} may overflow inside (interior)")
    if why := _decomposed(plan, program, is_rtx, forced):
        found["decompose_attention"] = True
        reasons.append(f"decompose_attention: {why}")
    return found, "; ".join(reasons)


def _decomposed(plan: PrecisionPlan | None, program: ExportedProgram, is_rtx: bool, forced: Sequence[str]) -> str:
    """Why attention has to be decomposed; empty where it need not be. forced: low nodes that may overflow inside."""
    attention = {node.name: node for node in attention_nodes(program)}
    if not attention.keys().isdisjoint(forced):
        return "so that attention accumulates in fp32"
    if not is_rtx:
        return ""
    masked = [name for name, node in attention.items() if _is_masked_fp32(node)]
    if masked:
        return f"{_listed(masked)} is masked and in fp32, which TensorRT-RTX fuses wrongly"
    if plan is None or not plan.low_precision_nodes:
        return ""
    high = [name for name in plan.high_precision_nodes if name in attention]
    return f"{_listed(high)} stays in fp32 among half-precision nodes" if high else ""


def _is_masked_fp32(node: fx.Node) -> bool:
    """Whether this is attention with a mask, in fp32. Fused by TensorRT-RTX 1.4 (on an H100, 2026-11-25), it has a
    relative error of 1.3 with every mask: bool, -inf, the lowest fp32, -1e4. Attention that is decomposed, causal,
    without a mask or in fp16 is right."""
    query = node.all_input_nodes[0].meta.get("val")
    masked = isinstance(argument_of(node, "attn_mask"), fx.Node)
    return masked and isinstance(query, torch.Tensor) and query.dtype == torch.float32
