"""Which tensors of a call are rounded together, and what the call then reads or gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from calibcast.calib.graph import argument_of, base_op
from calibcast.calib.operators import operator_of
from calibcast.calib.rounding import rounded, rounded_number, rounded_otherwise
from calibcast.calib.rounding_edges import Edge, Source, literals_of, with_numbers
from calibcast.calib.rounding_tape import Call, Tape, Value
from calibcast.calib.twins import compares, selects

# A value joined from more makers than this is rounded as a whole, and its noise is shared out among them.
_MOST_APART = 4
Results = tuple[Any, ...]
Rounding = Callable[[torch.Tensor, torch.dtype, bool], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Edges into one call that are rounded together.

    results: what the call then gives, as `Call.perform` gives it; None where rounding changes nothing. otherwise: the
    same with each element rounded the other way; gives None where that is not needed. added: for a bias, its error
    [channels], which is added to the only result along dimension `along`. apart: the same call with each edge rounded
    alone; for edges that are rounded together only because that takes less time. coherent: one number is rounded.
    """

    edges: tuple[Edge, ...]
    results: Callable[[torch.dtype], Results | None]
    otherwise: Callable[[torch.dtype], Results | None] = lambda low: None
    added: Callable[[torch.dtype], torch.Tensor] | None = None
    along: int = -1
    apart: tuple[Group, ...] = ()
    coherent: bool = False


class Rounder:
    """Rounds the values of one tape. masks: names of makers whose values are saturated first."""

    def __init__(self, tape: Tape, masks: Collection[str], weights: Collection[str]) -> None:
        self._tape, self._masks, self.weights = tape, masks, weights

    def groups(self, call: Call, edges: Sequence[Edge]) -> list[Group]:
        """The edges into a call, in groups. The parameters are one group, except a bias, which needs no call."""
        present = frozenset().union(*(value.sources for value in call.inputs))
        found: list[Group] = []
        weights: list[Edge] = []
        joined: list[Edge] = []
        twins = self._twins(call, edges)
        found += [self._together(call, part) for part in twins]
        for edge in edges:
            source = (edge.input, edge.output)
            if any(edge in part for part in twins):
                continue
            if edge.is_literal:
                found.append(self._literal(call, edge))
            elif source not in present:
                found.append(Group((edge,), lambda low: None))  # its value was overwritten
            elif self._bias(call, edge) is not None:
                found.append(self._biased(call, edge))
            elif edge.input in self.weights:
                weights.append(edge)
            elif any(source in value.sources and len(value.sources) > _MOST_APART for value in call.inputs):
                joined.append(edge)
            else:
                found.append(self._together(call, (edge,)))
        return [*found, *(self._at_once(call, part) for part in (weights, joined) if part)]

    def _at_once(self, call: Call, edges: Sequence[Edge]) -> Group:
        apart = tuple(self._together(call, (edge,)) for edge in edges) if len(edges) > 1 else ()
        return replace(self._together(call, tuple(edges)), apart=apart)

    def _twins(self, call: Call, edges: Sequence[Edge]) -> list[tuple[Edge, ...]]:
        """Operands of a comparison that come from one tensor, such as `m` and the k-th largest of `m`.

        Rounded together they compare as before, because rounding keeps the order. Rounding only one breaks ties.
        """
        if not compares(call.node):
            return []
        alike: dict[Source, list[Edge]] = {}
        for edge in edges:
            if not edge.is_literal and (edge.input, edge.output) in self._tape.made:
                alike.setdefault(self._origin((edge.input, edge.output)), []).append(edge)
        return [tuple(part) for part in alike.values() if len(part) > 1]

    def _origin(self, source: Source) -> Source:
        """The tensor that this one was sorted or picked from, past movers; `source` itself otherwise."""
        maker = self._tape.made[source].maker
        if maker is None or not selects(maker.node):
            return source
        read = frozenset().union(*(value.sources for value in maker.inputs))
        return self._origin(next(iter(read))) if len(read) == 1 else source

    def remade(self, value: Value, edges: Sequence[Edge], low: torch.dtype, how: Rounding = rounded) -> torch.Tensor:
        """`value` with those elements rounded that come along `edges`."""
        sources = {(edge.input, edge.output) for edge in edges}
        if not value.sources & sources:
            return value.tensor
        if value.sources <= sources:
            return how(value.tensor, low, any(name in self._masks for name, _ in value.sources))
        assert value.maker is not None
        given = {part: self.remade(part, edges, low, how) for part in value.maker.inputs}
        made = value.maker.perform(given)[value.position]
        assert isinstance(made, torch.Tensor)
        return made

    def _all_remade(
        self, call: Call, edges: Sequence[Edge], low: torch.dtype, how: Rounding
    ) -> dict[Value, torch.Tensor]:
        """`remade` for all inputs of a call. Parameters of one shape, such as a norm's, are rounded in one pass."""
        sources = {(edge.input, edge.output) for edge in edges}
        plain = [v for v in call.inputs if v.maker is None and v.sources and v.sources <= sources]
        names = {name for value in plain for name, _ in value.sources}
        if len(plain) < 2 or len({v.tensor.shape for v in plain}) > 1 or not names.isdisjoint(self._masks):
            return {value: self.remade(value, edges, low, how) for value in call.inputs}
        made = how(torch.stack([value.tensor for value in plain]), low, False)
        rest = {value: self.remade(value, edges, low, how) for value in call.inputs if value not in plain}
        return rest | dict(zip(plain, made.unbind(), strict=True))

    def energies(self, group: Group, low: torch.dtype) -> torch.Tensor:
        """The energy of each maker's rounding errors, [edges], on the device. A group's noise is shared out by it."""
        made = [self._tape.made[edge.input, edge.output].tensor for edge in group.edges]
        masks = [edge.input in self._masks for edge in group.edges]
        if len({tensor.shape for tensor in made}) == 1 and not any(masks):  # as of a norm: one pass over all
            whole = torch.stack(made)
            return (rounded(whole, low) - whole).square().flatten(1).sum(1)
        parts = zip(made, masks, strict=True)
        return torch.stack([(rounded(tensor, low, mask) - tensor).square().sum() for tensor, mask in parts])

    def _together(self, call: Call, edges: tuple[Edge, ...]) -> Group:
        def results(low: torch.dtype, how: Rounding = rounded) -> Results | None:
            given = self._all_remade(call, edges, low, how)
            changed = {value: made for value, made in given.items() if not _is_same(value, made)}
            return call.perform(changed) if changed else None

        one = all(self._tape.made[edge.input, edge.output].tensor.numel() == 1 for edge in edges)
        return Group(edges, results, lambda low: results(low, rounded_otherwise), coherent=one)

    def _literal(self, call: Call, edge: Edge) -> Group:
        name = edge.input.partition(":")[2]
        assert call.node is not None
        number = literals_of(call.node)[name]

        def results(low: torch.dtype) -> Results | None:
            made = rounded_number(number, low, call.name in self._masks)
            return (
                None
                if made == number
                else call.perform({}, with_numbers(call.run, call.args[0], call.args[1], {name: made}))
            )

        return Group((edge,), results, coherent=True)

    def _bias(self, call: Call, edge: Edge) -> Value | None:
        """The bias of a call, where the edge leads from it and it is added to each result."""
        if call.node is None or operator_of(base_op(call.node.target)).bias_along is None:
            return None
        bias = argument_of(call.node, "bias")
        found = [
            value for value in call.inputs if value.sources == {(edge.input, edge.output)} and value.tensor.ndim == 1
        ]
        holds = bias is not None and len(found) == 1 and call.args[0][2:3] == (found[0],)
        return found[0] if holds else None

    def _biased(self, call: Call, edge: Edge) -> Group:
        assert call.node is not None
        bias, [result] = self._bias(call, edge), call.outputs
        assert bias is not None
        assert result is not None
        along = operator_of(base_op(call.node.target)).bias_along
        assert along is not None
        behind = -along - 1

        def added(low: torch.dtype) -> torch.Tensor:
            return rounded(bias.tensor, low) - bias.tensor

        def results(low: torch.dtype) -> Results | None:
            return (result.tensor + added(low).reshape(-1, *[1] * behind),)

        return Group((edge,), results, added=added, along=along)


def _is_same(value: Value, made: torch.Tensor) -> bool:
    """Whether rounding changes nothing, as where a norm's weights are all 1. Only inputs and weights on the CPU are
    compared: activations are large, and the host would have to wait for a GPU.
    """
    small = value.maker is None and not made.is_cuda
    return made is value.tensor or (small and torch.equal(made, value.tensor))
