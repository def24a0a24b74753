"""Changes that no test can see, by rule: they change no result, or only what a GPU runs.

Each rule is short, so that a reader can judge it. What they leave out is counted in the report, which gives the share
of killed mutants with and without them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path

Span = tuple[tuple[int, int], tuple[int, int]]


def _span(node: ast.expr | ast.stmt | ast.keyword) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)


def _strict(node: ast.AST) -> list[Span]:
    """`strict=` of a zip: of lists that have one length by construction. Where they have not, it raises an error."""
    return [_span(node)] if isinstance(node, ast.keyword) and node.arg == "strict" else []


def _logged(node: ast.AST) -> list[Span]:
    """What is written to the log, not whether it is."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith(("_log.debug", "_log.info")):
        return []
    return [_span(argument) for argument in node.args]


def _kept(node: ast.AST) -> list[Span]:
    """`@cache` of a pure function: without it the same result comes later."""
    names = [n for n in getattr(node, "decorator_list", []) if ast.unparse(n).split("(")[0] in {"cache", "lru_cache"}]
    return [((n.lineno, n.col_offset - 1), (n.end_lineno or 0, n.end_col_offset or 0)) for n in names]  # from the @


RULES: dict[str, Callable[[ast.AST], list[Span]]] = {
    "`strict=` of a zip": _strict,
    "arguments of `_log.debug` and `_log.info`": _logged,
    "`@cache` and `@lru_cache`": _kept,
}
SAME_PROGRAM = "the same program in other words, such as `1e+30` for `1e30`"
NO_PROGRAM = "no program: it does not parse, such as `{/row}` for `{**row}`"
SAME_OBJECT = "`is` for `==` with a small whole number or a plain string, of which Python keeps one object"
ON_GPU = "files, classes and functions that run on a GPU alone"
# CUDA graphs, and what launches kernels: None is the whole file.
GPU_ALONE: dict[str, tuple[str, ...] | None] = {
    "captured_execution.py": None,
    "device_observer.py": ("DeviceObserver", "_try_out"),
}


def no_change(before: str, after: str) -> str | None:
    """The rule by which a change of the source makes no other program; None where it makes one."""
    try:
        tree = ast.parse(after)
    except SyntaxError:
        return NO_PROGRAM
    return SAME_PROGRAM if ast.dump(ast.parse(before)) == ast.dump(tree) else None


def unseen(path: Path, line: int, column: int, operator: str) -> str | None:
    """The rule by which no test can see this change; None where a test can."""
    if path.name in GPU_ALONE and _is_below(path, line, GPU_ALONE[path.name]):
        return ON_GPU
    for rule, (first, last) in _spans(path):
        if first <= (line, column) < last:
            return rule
    if operator.endswith(("_Eq_Is", "_NotEq_IsNot")) and (line, column) in _compared_with_small(path):
        return SAME_OBJECT
    return None


@cache
def _is_below(path: Path, line: int, names: tuple[str, ...] | None) -> bool:
    """Whether a line is in one of these classes or functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return names is None or any(n.name in names and n.lineno <= line <= (n.end_lineno or 0) for n in defined)


@cache
def _spans(path: Path) -> list[tuple[str, Span]]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return [(rule, span) for rule, finds in RULES.items() for node in nodes for span in finds(node)]


@cache
def _compared_with_small(path: Path) -> set[tuple[int, int]]:
    """Every position within comparisons of which one side is such a number or string."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and any(map(_small, [node.left, *node.comparators])):
            (line, start), (last, end) = _span(node)
            found |= {(line, column) for column in range(start, end if last == line else 200)}
    return found


def _small(node: ast.expr) -> bool:
    if not isinstance(node, ast.Constant):
        return False
    value = node.value
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 6)
