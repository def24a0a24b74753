"""Mutants to try: places drawn by a seed, one of cosmic-ray's changes at each."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

FOLDERS = ("calib", "passes")
# Kernels for a GPU: no test of this machine runs them.
NEEDS_GPU = ("triton_",)


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `path` is relative to the repository, `line` counts from 1."""

    path: str
    line: int
    column: int
    operator: str
    occurrence: int

    def code(self, source: str) -> str:
        """The file's text with the change in it."""
        return str(mutate_code(source, get_operator(self.operator)(), self.occurrence))

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.operator.removeprefix('core/')}"


def drawn(root: Path, count: int, seed: int) -> list[Mutant]:
    """`count` mutants of different places. Each place is as likely as any other, however many changes it allows."""
    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for mutant in all_mutants(root):
        places[mutant.path, mutant.line, mutant.column].append(mutant)
    rng = random.Random(seed)
    chosen = rng.sample(sorted(places), min(count, len(places)))
    return [rng.choice(places[place]) for place in chosen]


def all_mutants(root: Path) -> list[Mutant]:
    """Every change that cosmic-ray's operators without arguments make, but in what never runs."""
    operators = [name for name in sorted(operator_names()) if not get_operator(name).arguments()]
    found = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        if path.name.startswith(NEEDS_GPU):
            continue
        skipped = never_run(path)
        tree = get_ast_from_path(path)
        nodes = list(ast_nodes(tree))
        for name in operators:
            operator = get_operator(name)()
            starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            found += [
                Mutant(str(path.relative_to(root)), line, column, name, occurrence)
                for occurrence, (line, column) in enumerate(starts)
                if not any(first <= (line, column) < last for first, last in skipped)
            ]
    return found


def never_run(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change changes nothing: annotations, which stay text, and imports for type checkers."""
    nodes: list[ast.expr | ast.stmt] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            nodes.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
            nodes.append(node.returns)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes]


def read_at(root: Path, path: str, line: int) -> dict[str, set[int]]:
    """By file: the lines that read a constant of a module, which is set at this line; {} where none is set there."""
    names = {
        target.id
        for statement in ast.parse((root / path).read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and statement.lineno <= line <= (statement.end_lineno or 0)
        for target in ast.walk(statement)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    }
    found: dict[str, set[int]] = {}
    for file in (file for folder in FOLDERS for file in (root / folder).rglob("*.py") if names):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        here = str(file.relative_to(root)) == path
        module = path.removesuffix(".py").replace("/", ".")
        imported = {
            alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(module)
            for alias in node.names
        }
        known = names if here else names & imported
        lines = {n.lineno for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id in known}
        if lines:
            found[str(file.relative_to(root))] = lines
    return found


def in_function(path: Path, line: int) -> bool:
    """Whether a line runs each time a function is called: not when its file is imported, nor in a first call alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    around = [n for n in functions if n.body[0].lineno <= line <= (n.end_lineno or 0)]
    return bool(around) and not any("cache" in ast.unparse(name) for n in around for name in n.decorator_list)
