"""Makes the page: everything is inline, all outside text is escaped, and no network request is possible."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from calibcast.calib.number_text import counted, percent
from calibcast.calib.ranges import RangeTable
from calibcast.engines.html_report.banner import banner, low_label, verdict_level, verdict_words
from calibcast.engines.html_report.payload import packed, payload
from calibcast.passes.plan import Decision, PrecisionPlan
from calibcast.passes.verdict import HIGH, KEPT, LOW
from markupsafe import Markup
from plotly.offline import get_plotlyjs

_FOLDER = Path(__file__).parent
_PARTS = ("data", "decisions", "charts", "table", "events")


def html_report(
    ranges: RangeTable,
    plan: PrecisionPlan | None = None,
    verification: Mapping[str, Any] | None = None,
    title: str = "ranges",
    made: date | None = None,
) -> str:
    """The report as one HTML page that needs nothing else: no network, no file beside it.

    Args:
        plan: colours nodes by precision and gives each its reason; its `flips` and `budgets` drive the slider.
        verification: the content of the file that `calibcast verify -o` writes, for the verdict.
        title: what the page shows, such as the file's name. made: the day on which the ranges were measured.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    plotly, script = Markup(get_plotlyjs()), Markup(_script())
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=_subtitle(ranges, made),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        plotly=plotly,
        script=script,
        hashes=" ".join(f"'{_hash(text)}'" for text in (plotly, script)),
        payload=packed(payload(ranges, plan)),
        facts=_facts(ranges, plan),
        rules=_rules(plan),
        verdict=None if verification is None else _verdict(verification),
        banner=banner(ranges, plan, verification),
        low=low_label(plan),
        stays=plan is not None and bool(plan.high_precision_nodes),
        notes=() if plan is None else plan.notes,
        has_plan=plan is not None,
        has_budgets=plan is not None and bool(plan.budgets),
        has_flips=plan is not None and bool(plan.flips),
    )


def _script() -> str:
    """The parts of the page's script in one async scope, since the script waits until its data are unpacked."""
    parts = [(_FOLDER / "page" / f"{name}.js").read_text(encoding="utf-8") for name in _PARTS]
    return "\n".join(['"use strict";', "(async () => {", *parts, "})();"])


def _hash(script: str) -> str:
    """The hash by which a content security policy allows an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _subtitle(ranges: RangeTable, made: date | None) -> str:
    """The model, the data and the date of the measurement in a few words."""
    calibration = ranges.calibration
    parts = [
        f"a model of {counted(len(calibration.digests), 'node')}",
        f"{counted(calibration.batches, 'batch')} of data",
    ]
    return ", ".join([*parts, *([] if made is None else [made.isoformat()])])


def _facts(ranges: RangeTable, plan: PrecisionPlan | None) -> list[tuple[str, str]]:
    """What was measured and decided, as name and value."""
    calibration, frame = ranges.calibration, ranges.frame
    inputs = frame.filter(frame["kind"] == "input").select("node", "shape").rows()
    skipped = f", {len(calibration.skipped)} skipped as non-finite" if calibration.skipped else ""
    facts = [
        ("model", f"{len(calibration.digests)} graph nodes, fingerprint {calibration.fingerprint[:12]}"),
        ("inputs", "; ".join(f"{node} [{', '.join(shape)}]" for node, shape in inputs) or "none that is floating"),
        ("data", f"{counted(calibration.batches, 'batch')}{skipped}"),
        ("tensors", str(ranges.true_values()).split(": ", 1)[-1]),
        ("versions", ", ".join(f"{name} {version}" for name, version in calibration.versions.items())),
    ]
    if calibration.rescaled is not None:
        stored = f"{len(calibration.rescaled.exponents)} tensors are stored as powers of two of themselves"
        facts.append(("rescaled", f"{stored}; numbers here are true values, limits are of what is stored"))
    if plan is not None:
        counts = Counter(decision.precision for decision in plan.decisions)
        nodes, work = plan.share()
        low = low_label(plan)
        facts.append(("plan", f"{counts[LOW]} nodes {low}, {counts[HIGH]} fp32, {counts[KEPT]} kept as they were"))
        facts.append((f"in {low}", f"{percent(nodes)} of nodes, {percent(work)} of work"))
        facts.append(("settings", _settings(plan.settings)))
    return facts


def _settings(settings: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in settings.items() if name != "rules" and value not in ([], None, {})}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _rules(plan: PrecisionPlan | None) -> list[dict[str, Any]]:
    """The plan's nodes grouped by rule: first those in fp32, then the low ones, then the kept ones; largest groups
    first."""
    if plan is None:
        return []
    whole = sum(decision.work for decision in plan.decisions)
    found: dict[tuple[str, str], list[Decision]] = {}
    for decision in plan.decisions:
        found.setdefault((decision.precision, decision.rule or ""), []).append(decision)
    order = {HIGH: 0, LOW: 1, KEPT: 2}
    types = {HIGH: "fp32", LOW: low_label(plan), KEPT: KEPT}
    return [
        {
            "precision": precision,
            "type": types[precision],
            "rule": rule,
            "nodes": len(nodes),
            "work": percent(sum(node.work for node in nodes) / whole if whole else 0.0),
            "example": _named(nodes[0]),
        }
        for (precision, rule), nodes in sorted(found.items(), key=lambda i: (order[i[0][0]], -len(i[1])))
    ]


def _named(decision: Decision) -> str:
    return f"{decision.node} ({decision.module})" if decision.module else decision.node


_OUTPUT_COLUMNS = (
    "output", "sqnr_db", "variation_db", "worst_variation_db", "worst_channel", "rel_l2", "max_abs", "nonfinite",
    "equal", "unlike",
)  # fmt: skip


def _verdict(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "level": verdict_level(content),
        "words": verdict_words(content),
        "batches": counted(content.get("batches") or 0, "batch"),
        "problems": list(content.get("problems") or ()),
        "metrics": {name: _number(value) for name, value in dict(content.get("metrics") or {}).items()},
        "outputs": [{name: _number(row.get(name)) for name in _OUTPUT_COLUMNS} for row in content.get("outputs") or ()],
    }


def _number(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
