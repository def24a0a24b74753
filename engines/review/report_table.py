"""The range report as a frame and as a plain table: worst first, filtered, as wide as the terminal."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import polars as pl
from calibcast.calib.errors import known
from calibcast.calib.range_diff import HALF_MAX
from calibcast.calib.range_scaling import true_frame
from calibcast.calib.ranges import RangeTable
from calibcast.calib.terminal_text import wrapped
from calibcast.calib.text_table import Column, and_more, place, text_table
from calibcast.engines.usage import UsageError

if TYPE_CHECKING:
    from calibcast.passes.plan import PrecisionPlan

_KINDS = ("input", "parameter", "buffer", "constant", "activation")
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}


def report_frame(  # noqa: PLR0913 - one per filter
    ranges: RangeTable,
    plan: PrecisionPlan | None = None,
    *,
    above: float | None = None,
    op: str | None = None,
    module: str | None = None,
    kind: str | None = None,
    rule: str | None = None,
    where: Iterable[str] = (),
    sort: str | None = None,
    descending: bool = True,
) -> pl.DataFrame:
    """The table's rows, worst first: non-finite ones, then by magnitude. The columns are those of `ranges.frame`, and

    `headroom`, how many times the tensor could grow before fp16 overflows; `nonfinite`, how many NaN and Inf; with a
    plan, each node's `precision`, `rule` and `reason`. For a rescaled program all numbers are the network's own, except
    `headroom`, which is that of the stored tensor; `exponent` and `stored_absmax` say how it is stored. All filters
    must hold:

    above: the magnitude is larger, or nothing is finite. op: an operator, `linear`, `aten.linear` or with its overload.
    module: a regex, matched from the start of the module path. kind: of the tensor. rule: one that the node has met,
    decisive or not. where: conditions on any column, `"rms>3"`, `"dtype=float16"`, `"source~model.py"` (a regex
    anywhere). sort: a column, largest first, or smallest first if not `descending`; nulls last.

    Raises UsageError for an unknown column, kind, operator or rule, with the known ones.
    """
    frame = true_frame(ranges).with_columns(
        headroom=HALF_MAX / pl.col("stored_absmax"),
        nonfinite=pl.col("nan") + pl.col("posinf") + pl.col("neginf"),
    )
    if ranges.calibration.rescaled is None:
        frame = frame.drop("exponent", "stored_absmax")
    if plan is not None:
        frame = frame.join(_decisions(plan), on="node", how="left", maintain_order="left")
    nothing_finite = pl.col("absmax").is_null() & (pl.col("nonfinite") > 0)  # so neither only mask values nor empty
    conditions = [] if above is None else [(pl.col("absmax") > above) | nothing_finite]
    if op is not None:
        conditions.append(_has_op(frame, op))
    if module is not None:
        conditions.append(_matches("module", f"^(?:{_regex(module)})"))
    if kind is not None:
        conditions.append(_is_kind(kind))
    if rule is not None:
        conditions.append(_has_rule(frame, plan, rule))
    conditions += [_condition(frame, text) for text in where]
    found = _sorted(frame.filter(conditions) if conditions else frame, sort, descending).drop("rules", strict=False)
    # The sort column comes early: polars prints only the first four and the last four of many columns.
    front = dict.fromkeys(["node", "module", sort or "absmax", "headroom"])
    return found.select(*front, pl.exclude(*front))


def report_table(
    ranges: RangeTable,
    plan: PrecisionPlan | None = None,
    rows: int | None = None,
    frame: pl.DataFrame | None = None,
    sort: str | None = None,
) -> str:
    """The first `rows` rows (None: all) of `frame` (None: all tensors) as text, below a title on what was measured.

    sort: the column that the frame is sorted by, which is shown then.
    """
    found = report_frame(ranges, plan) if frame is None else frame
    columns = [
        Column("tensor", "node"),
        Column("module", "module"),
        Column("kind", "kind", 10, drop=3),
        Column("absmax", "absmax", 9, number=True),
        Column("smallest", "smallest", 9, number=True, drop=4),
        Column("headroom", "headroom", 9, number=True),
        Column("bad", "NaN/Inf", 9, number=True, drop=1),
    ]
    if ranges.calibration.rescaled is not None:
        # The name shows the kind, too, and an 80-column terminal has no room for both columns.
        columns = [Column("stored", "stored as", 9) if c.name == "kind" else c for c in columns]
        found = found.with_columns(stored=_stored(pl.col("exponent")))
    if plan is not None:
        columns += [Column("precision", "type", 4), Column("rule", "rule", 12, head=True, drop=2)]
    if sort is not None and sort not in {"node", *(column.name for column in columns)}:
        columns.insert(2, Column(sort, sort, 24, number=found.schema[sort].is_numeric()))
    shown = found if rows is None else found.head(rows)
    cells = [
        {**row, "tensor": place(row["node"], row["output"]), "bad": row["nonfinite"] or None}
        for row in shown.iter_rows(named=True)
    ]
    lines = [*_titles(ranges), *text_table(cells, columns), *and_more(len(shown), len(found), "; --rows 0 shows all")]
    if len(found) < len(ranges):
        lines.append(f"{len(found)} of {len(ranges)} tensors")
    return "\n".join(lines)


def _stored(exponent: pl.Expr) -> pl.Expr:
    """`2^-10 x` for a tensor that is stored as 2^-10 times itself; "" for one that is stored as it is."""
    power = pl.format("2^{} x", -exponent)
    return pl.when(exponent == 0).then(pl.lit("")).otherwise(power)


def _titles(ranges: RangeTable) -> list[str]:
    record = ranges.calibration.rescaled
    if record is None:
        return wrapped(str(ranges)).split("\n")
    stored = f"{len(record.exponents)} tensors are stored as powers of two of themselves"
    about = f"a rescaled program, in true values: {stored}, and headroom is of what is stored"
    return wrapped(f"{ranges.true_values()}\n{about}").split("\n")


def overflowing(ranges: RangeTable, frame: pl.DataFrame) -> frozenset[int]:
    """Numbers of the lines of `report_table` with tensors that fp16 cannot hold, or that are not finite."""
    first = len(_titles(ranges)) + 1  # under the heading
    bad = frame.select(((pl.col("headroom") < 1) | (pl.col("nonfinite") > 0)).fill_null(False)).to_series()
    return frozenset(row + first for row in bad.arg_true().to_list())


def _decisions(plan: PrecisionPlan) -> pl.DataFrame:
    rows = [(d.node, d.precision, d.rule, d.reason, [v.rule for v in d.verdicts]) for d in plan.decisions]
    schema = {"node": pl.String, "precision": pl.String, "rule": pl.String, "reason": pl.String}
    return pl.DataFrame(rows, schema={**schema, "rules": pl.List(pl.String)}, orient="row")


def _sorted(frame: pl.DataFrame, sort: str | None, descending: bool) -> pl.DataFrame:
    if sort is None:
        bad = pl.col("nonfinite") > 0
        keys = [bad, pl.col("absmax").fill_null(pl.when(bad).then(float("inf")).otherwise(0.0))]
        return frame.sort(keys, descending=descending, maintain_order=True)
    _check_column(frame, sort)
    if isinstance(frame.schema[sort], pl.List):
        raise UsageError(f"--sort {sort}: it is a list; sort by another column")
    return frame.sort(sort, descending=descending, nulls_last=True, maintain_order=True)


def _has_op(frame: pl.DataFrame, op: str) -> pl.Expr:
    name = op.removeprefix("torch.ops.")
    full = pl.col("op")
    plain = full.str.strip_prefix("aten.")
    found = (full == name) | (plain == name) | full.str.starts_with(f"{name}.") | plain.str.starts_with(f"{name}.")
    if not frame.select(found.any()).item():
        short = {part.removeprefix("aten.").split(".")[0] for part in frame["op"].unique()}
        raise UsageError(f"--op {op}: no tensor is of this operator; {known(op, short)}")
    return found


def _is_kind(kind: str) -> pl.Expr:
    if kind not in _KINDS:
        raise UsageError(f"--kind {kind}: no kind of tensor; {known(kind, _KINDS)}")
    return pl.col("kind") == kind


def _has_rule(frame: pl.DataFrame, plan: PrecisionPlan | None, rule: str) -> pl.Expr:
    if plan is None:
        raise UsageError(f"--rule {rule}: rules are of a plan; give --plan P.json")
    met = {v.rule for d in plan.decisions for v in d.verdicts} | {d.rule for d in plan.decisions if d.rule}
    asked = {str(name) for name in plan.settings.get("rules", ())}  # also those that no node has met
    if rule not in met | asked:
        raise UsageError(f"--rule {rule}: the plan has no such rule; {known(rule, met | asked)}")
    return pl.col("rules").list.contains(rule).fill_null(False) | (pl.col("rule") == rule).fill_null(False)


def _condition(frame: pl.DataFrame, text: str) -> pl.Expr:
    parsed = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|==|=|<|>|~)\s*(.*?)\s*", text, flags=re.DOTALL)
    if parsed is None:
        raise UsageError(f"--where {text!r}: give COLUMN, one of < <= > >= = != ~, and a value, such as 'rms>3'")
    name, comparison, value = parsed.groups()
    _check_column(frame, name)
    dtype = frame.schema[name]
    if isinstance(dtype, pl.List):
        raise UsageError(f"--where {text!r}: {name} is a list; choose another column")
    if comparison == "~":
        return _matches(name, _regex(value))
    if not dtype.is_numeric():
        return _COMPARISONS[comparison](pl.col(name), pl.lit(value))  # type: ignore[no-any-return]
    try:
        return _COMPARISONS[comparison](pl.col(name), float(value))  # type: ignore[no-any-return]
    except ValueError as error:
        raise UsageError(f"--where {text!r}: {name} is a number, and {value!r} is not") from error


def _matches(column: str, pattern: str) -> pl.Expr:
    # With Python's own regexes, as everywhere else in calibcast: those of polars have no look-around.
    compiled = re.compile(pattern)
    return (
        pl.col(column).cast(pl.String).map_elements(lambda s: compiled.search(s) is not None, return_dtype=pl.Boolean)
    )


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def _check_column(frame: pl.DataFrame, name: str) -> None:
    if name not in frame.columns:
        raise UsageError(f"there is no column {name!r}; {known(name, frame.columns, most=12)}")
