"""Bounds of the sizes inside a program, computed from those of its inputs, for engines' optimization profiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import sympy
from calibcast.calib.batches import Signature, signature_of
from calibcast.calib.dimension_names import dimension_names
from calibcast.calib.errors import BuildError
from calibcast.engines.tensorrt.builder.job import Profile
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

Bounds = tuple[int, int, int]  # least, most frequent, largest
# Up to this many sizes of a symbol are tried one by one. For more, and for several symbols, bounds come from interval
# arithmetic, which may be wider than needed (for `s - s // 2`), but never too narrow.
_TRIED = 4096


def sizes_in_graph(program: ExportedProgram, profiles: Sequence[Profile]) -> dict[str, Bounds]:
    """`symbol_sizes` of a program by the user's names, which its signature has, and also by torch's names, which its
    graph has."""
    found = symbol_sizes(signature_of(program), profiles)
    called = dimension_names(program)
    return found | {symbol.name: found[name] for symbol, name in called.items() if name in found}


def symbol_sizes(signature: Signature, profiles: Sequence[Profile]) -> dict[str, Bounds]:
    """The bounds of each symbol in the sizes of a program's inputs, by the symbol's name.

    profiles: one for each flat input. A symbol that is nowhere a size by itself is solved for: where `2 * s` is 8, `s`
    is 4.
    """
    found: dict[str, Bounds] = {}
    compound: list[tuple[Any, Bounds]] = []
    for leaf, profile in zip(signature.leaves, profiles, strict=True):
        for size, bounds in zip(leaf.sizes, zip(*profile, strict=True), strict=True):
            if isinstance(size, sympy.Symbol):
                found.setdefault(size.name, bounds)
            elif isinstance(size, sympy.Expr):
                compound.append((size, bounds))
    for size, bounds in compound:
        if len(size.free_symbols) == 1:
            (symbol,) = size.free_symbols
            if symbol.name not in found and (solved := _solved(size, symbol, bounds)) is not None:
                found[symbol.name] = solved
    return found


def _solved(size: Any, symbol: Any, bounds: Bounds) -> Bounds | None:
    values = []
    for bound in bounds:
        roots = [int(root) for root in sympy.solve(size - bound, symbol) if root.is_integer and root >= 0]
        if len(roots) != 1:
            return None
        values.append(roots[0])
    least, usual, largest = values
    return min(least, largest), usual, max(least, largest)


def bounds_of(size: Any, sizes: Mapping[str, Bounds]) -> Bounds | None:
    """Least, most frequent and largest value of a size expression; None where a symbol in it is not known."""
    symbols = sorted(getattr(size, "free_symbols", ()), key=str)
    if not symbols:
        return int(size), int(size), int(size)
    if any(symbol.name not in sizes for symbol in symbols):
        return None
    ranges = [sizes[symbol.name] for symbol in symbols]
    usual = _value(size, symbols, [usual for _, usual, _ in ranges])
    seen = [usual, *(_value(size, symbols, values) for values in _tried(ranges))]
    least, largest = min(seen), max(seen)
    if len(symbols) > 1 or ranges[0][2] - ranges[0][0] > _TRIED:
        interval = bound_sympy(
            size, {symbol: ValueRanges(low, high) for symbol, (low, _, high) in zip(symbols, ranges, strict=True)}
        )
        least, largest = min(least, int(interval.lower)), max(largest, int(interval.upper))
    return least, usual, largest


def _tried(ranges: Sequence[Bounds]) -> Iterator[tuple[int, ...]]:
    """Values of the symbols to try: every value of a single symbol with few values, else the corners of the ranges."""
    if len(ranges) == 1 and ranges[0][2] - ranges[0][0] <= _TRIED:
        return ((value,) for value in range(ranges[0][0], ranges[0][2] + 1))
    return product(*((low, high) for low, _, high in ranges))


def _value(size: Any, symbols: Sequence[Any], values: Sequence[int]) -> int:
    return int(size.xreplace({symbol: sympy.Integer(value) for symbol, value in zip(symbols, values, strict=True)}))


def shape_bounds(shape: Sequence[Any], sizes: Mapping[str, Bounds]) -> Profile | None:
    """The profile of a tensor whose sizes are numbers or torch.SymInts; None where a symbol is not known."""
    bounds = [bounds_of(getattr(getattr(size, "node", None), "expr", size), sizes) for size in shape]
    known = [found for found in bounds if found is not None]
    if len(known) < len(bounds):
        return None
    return tuple(b[0] for b in known), tuple(b[1] for b in known), tuple(b[2] for b in known)


def check_profile_read_back(engine: str, asked: Mapping[str, Profile], built: Mapping[str, Profile]) -> None:
    """Raise BuildError where an engine's own profile, read back from TensorRT, is not the profile that was asked for.

    asked, built: profiles by the name of the engine's input. Inputs without a dynamic size have none in `built`.
    """
    for name, wanted in asked.items():
        if name in built:
            got = built[name]
            if got != wanted:
                raise BuildError(f"{engine}: input {name} was built for {_told(got)}, and {_told(wanted)} was asked")


def _told(profile: Profile) -> str:
    least, usual, largest = (list(shape) for shape in profile)
    return f"{least} to {largest} (most often {usual})"
