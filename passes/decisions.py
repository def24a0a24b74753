"""Decide all nodes of a program by the rules; nodes that share written storage get the same decision."""

from __future__ import annotations

from collections.abc import Mapping

from calibcast.calib.graph import module_path, op_name
from calibcast.passes.judge import Judge
from calibcast.passes.plan import Decision
from calibcast.passes.program_facts import ProgramFacts
from calibcast.passes.regions import Candidate
from calibcast.passes.ties import forced_by_ties
from calibcast.passes.verdict import KEPT, LOW, Verdict


def decide(program: ProgramFacts, judge: Judge, work: Mapping[str, int]) -> list[Decision]:
    """Decide in graph order, and repeat until ties have settled: each round can only turn low nodes high.

    work: FLOPs of each node, by name.
    """
    reader = program.reader(judge.low_type)
    forced: dict[str, Verdict] = {}
    while True:
        precisions: dict[str, str] = {}
        decisions = []
        for candidate in program.nodes:
            outline = program.outlines.get(candidate.name)
            if outline is None:
                decision = _keep(candidate, work[candidate.name])
            else:
                facts = reader.read(outline, precisions)
                decision = judge.decide(facts, work[candidate.name], forced.get(candidate.name))
                precisions[candidate.name] = decision.precision
            decisions.append(decision)
        more = forced_by_ties(program.ties, precisions, forced)
        more |= _forced_by_readers(program, judge, precisions, forced)
        if not more:
            return decisions
        forced |= more


def _keep(candidate: Candidate, work: int) -> Decision:
    reason = candidate.kept
    assert reason is not None
    return Decision(
        node=candidate.name,
        op=op_name(candidate.node.target),
        module=module_path(candidate.node),
        precision=KEPT,
        rule=reason.rule,
        reason=reason.reason,
        work=work,
    )


def _forced_by_readers(
    program: ProgramFacts, judge: Judge, precisions: Mapping[str, str], forced: Mapping[str, Verdict]
) -> dict[str, Verdict]:
    """A node that only moves data between an fp32 source and an fp32 reader stays in fp32: low, it would round the
    data.
    """
    more: dict[str, Verdict] = {}
    reader = program.reader(judge.low_type)
    for name, readers in program.leading.items():
        high = next((other for other in readers if precisions.get(other, LOW) != LOW), None)
        if high is None or precisions.get(name) != LOW or name in forced:
            continue
        facts = reader.read(program.outlines[name], precisions)
        if not facts.rounding_known and not judge.included(facts):
            more[name] = Verdict("follows", f"it only moves data from an fp32 source, and its reader {high} is high")
    return more
