"""What the user calls the sizes that an export left open: `batch`, where torch says `s77`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram


def dimension_names(program: ExportedProgram) -> dict[sympy.Symbol, str]:
    """A name for each symbol that is a size of an input: that of the user's `Dim`, else input and dimension (`x[0]`).

    A program keeps the names of its `Dim`s until it is saved: a `.pt2` file does not have them.
    """
    found: dict[sympy.Symbol, str] = {}
    for symbol, name in _input_sizes(program):
        found.setdefault(symbol, name)
    return found


def named_size(size: Any, names: Mapping[sympy.Symbol, str]) -> str:
    """A size as text, with the user's names: `2*batch`. size: an int, a SymInt or a sympy expression."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return str(renamed(expression, names))


def renamed(expression: Any, names: Mapping[sympy.Symbol, str]) -> Any:
    """An expression of sympy with the user's names; anything else as it is."""
    if not isinstance(expression, sympy.Basic):
        return expression
    called = {s: sympy.Symbol(name, integer=True, positive=s.is_positive) for s, name in names.items()}
    return expression.xreplace(called)


def _input_sizes(program: ExportedProgram) -> Iterator[tuple[sympy.Symbol, str]]:
    """Symbols with their names; the user's names come first."""
    inputs = set(program.graph_signature.user_inputs)
    seen: list[tuple[sympy.Symbol, str]] = []
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.name in inputs else None
        if not isinstance(value, torch.Tensor):
            continue
        for dimension, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                seen.append((size.node.expr, f"{node.name}[{dimension}]"))
                yield from _of_dims(size)
    yield from seen


def _of_dims(size: torch.SymInt) -> Iterator[tuple[sympy.Symbol, str]]:
    """The `Dim`s of the export that `size` belongs to. torch keeps them for its own messages."""
    environment = size.node.shape_env
    named = getattr(environment, "source_name_to_debug_name", {})
    for source, symbol in getattr(environment, "source_to_var", {}).items():
        name = named.get(source, source)  # the root of `2 * batch` is listed by its own name
        if isinstance(symbol, sympy.Symbol) and name.isidentifier():
            yield symbol, name
