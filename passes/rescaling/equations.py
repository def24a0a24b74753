"""The table of exponents, read for one node: chains of expressions that are equal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from calibcast.calib.graph import argument_of, as_list, base_op, size_hint
from calibcast.calib.operators import MOVES
from calibcast.calib.operators.exponents import EQUATIONS, NOT_WHEN, OF_THE_FIRST, POWER, POWERS
from torch import fx

_TERM = re.compile(r"([+-]?)\s*(\d+(?=\s))?\s*(sum\s)?\s*([A-Za-z_]\w*|0)")


@dataclass(frozen=True, slots=True)
class Term:
    """`count` times the exponent of an argument, of a result, or of the unknown `j`. every: summed over a list."""

    name: str
    count: int = 1
    every: bool = False


Expression = tuple[Term, ...]
Chain = tuple[Expression, ...]  # expressions that are all equal


@cache
def parsed(text: str) -> tuple[Chain, ...]:
    """The chains of equal expressions in one line of the table."""
    return tuple(tuple(_expression(side) for side in chain.split("=")) for chain in text.split(";") if chain.strip())


def _expression(text: str) -> Expression:
    return tuple(
        Term(name, int(count or 1) * (-1 if sign == "-" else 1), bool(every))
        for sign, count, every, name in _TERM.findall(text)
        if name != "0"
    )


def equations_of(node: fx.Node, table: Mapping[str, str] = EQUATIONS) -> tuple[Chain, ...] | None:
    """The equations between the exponents around `node`; None where none are known, so that all exponents are 0."""
    base = base_op(node.target)
    if base == POWER:
        exponent = argument_of(node, "exponent")
        text = POWERS.get(float(exponent)) if isinstance(exponent, (int, float)) else None
        return None if text is None else parsed(text)
    if base in NOT_WHEN and argument_of(node, NOT_WHEN[base]):
        return None
    if base in table:
        return parsed(table[base])
    if base in OF_THE_FIRST:
        return parsed("out = self")
    return parsed("out = moved") if base in MOVES else None


def implied(node: fx.Node, name: str) -> float | None:
    """The number that an operator uses where none was given: a norm's eps, attention's scale; else None."""
    if name == "eps":
        return float(torch.finfo(torch.float32).eps)
    if name == "scale":
        query = argument_of(node, "query")
        return float(1.0 / float(size_hint(query.meta["val"].shape[-1])) ** 0.5)
    return None


def moved_tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a mover takes, those of lists included."""
    return [n for argument in node.args for n in as_list(argument) if isinstance(n, fx.Node)]
