"""Turn what a dataloader gives into the flat inputs of a program, or raise an error that says what did not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from calibcast.calib.dimension_names import dimension_names, renamed
from calibcast.calib.errors import BatchError, CalibcastError, known, raised_at
from calibcast.calib.input_checks import Leaf, Place, check_leaf, check_sizes, from_numpy, sizes_of_symbols
from calibcast.calib.number_text import counted
from calibcast.calib.sequences import FlatInputs, unwrapped
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

_MISSING = object()


@dataclass(frozen=True)
class Signature:
    """What a program takes: names and structure of its arguments, and each tensor in them."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    specs: tuple[pytree.TreeSpec, ...]  # one per argument: positional ones first, then keywords
    leaves: tuple[Leaf, ...]
    bounds: dict[Any, tuple[int, int | None]] = field(hash=False)

    @property
    def names(self) -> tuple[str, ...]:
        return self.positional + self.keywords

    def __str__(self) -> str:
        return f"({', '.join(f'{leaf.name}: {leaf}' for leaf in self.leaves)})"

    def flatten(self, batch: Any, index: int) -> list[Any]:
        """The flat inputs in `batch`. Raises a BatchError that names the batch, the argument and what came instead."""
        at = Place(index)
        return self._flat(*self._as_call(batch, at), at)

    def flatten_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call. Raises a BatchError that names the argument and what came instead."""
        return self._flat(args, kwargs, Place(None))

    def _flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Place) -> list[Any]:
        values = self._by_argument(args, kwargs, at)
        flat: list[Any] = []
        for name, value, spec in zip(self.names, values, self.specs, strict=True):
            if value is _MISSING:
                flat.extend(self._constants(name, spec, len(flat), at))
            else:
                _conform(value, spec, at.of(name), flat)
        for leaf, value in zip(self.leaves, flat, strict=True):
            check_leaf(leaf, value, at.of(leaf.name))
        sizes = sizes_of_symbols(zip(self.leaves, flat, strict=True))
        for leaf, value in zip(self.leaves, flat, strict=True):
            check_sizes(leaf, value, sizes, self.bounds, at.of(leaf.name))
        return flat

    def _by_argument(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], at: Place) -> list[Any]:
        if len(args) > len(self.positional):
            raise BatchError(
                f"{at}: got {len(args)} inputs, but the program takes {len(self.positional)} by position: {self}. "
                f"{at.hint}{at.only(' For a (inputs, label) pair: transform=lambda batch: batch[0].')}"
            )
        unknown = [key for key in kwargs if key not in self.names[len(args) :]]
        if unknown:
            pick = f" To pick columns: transform=lambda b: {{k: b[k] for k in {list(self.names)}}}."
            raise BatchError(
                f"{at}: unknown input {unknown[0]!r} ({known(str(unknown[0]), self.names)}); the program takes "
                f"{self}. {at.hint}{at.only(pick)}"
            )
        values = list(args) + [_MISSING] * (len(self.names) - len(args))
        for key, value in kwargs.items():
            values[self.names.index(key)] = value
        return values

    def _as_call(self, batch: Any, at: Place) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Read a batch as positional and keyword arguments."""
        first = _type_of(self.specs[0]) if self.positional else None
        if isinstance(batch, torch.Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            fits_by_name = all(key in self.names for key in batch)
            whole = not fits_by_name and len(self.positional) == 1 and first is not None and issubclass(first, dict)
            return ((batch,), {}) if whole else ((), batch)
        if isinstance(batch, (tuple, list)):
            takes_sequence = first is not None and issubclass(first, (tuple, list))
            if _is_call(batch) and not self._is_two_arguments(batch):
                return tuple(batch[0]), batch[1]
            if takes_sequence and len(self.positional) == 1 and _has_structure(batch, self.specs[0]):
                return (batch,), {}
            return tuple(batch), {}
        if first is not None and isinstance(batch, first):
            return (batch,), {}  # a registered pytree node, such as a dataclass
        how = f"Convert it {at.here}{from_numpy(batch)}." if from_numpy(batch) else at.hint
        raise BatchError(f"{at} is a {type(batch).__name__}; the program takes {self}. {how}")

    def _is_two_arguments(self, batch: tuple[Any, ...] | list[Any]) -> bool:
        """Whether the program takes two arguments like this pair: a sequence, and a dict with these keys."""
        pair = len(self.positional) == 2 and all(map(_has_structure, batch, self.specs[:2]))
        return pair and _type_of(self.specs[1]) is not None

    def _constants(self, name: str, spec: pytree.TreeSpec, start: int, at: Place) -> list[Any]:
        """The values of an argument that was left out. Only arguments that the export made constant may be left out."""
        leaves = self.leaves[start : start + spec.num_leaves]
        if any(leaf.dtype is not None or leaf.sizes for leaf in leaves):
            raise BatchError(f"{at}: input {name!r} is missing; the program takes {self}. {at.hint}")
        return [leaf.constant for leaf in leaves]


def signature_of(program: ExportedProgram) -> Signature:
    """Read what `program` takes from its call spec and graph."""
    in_spec = program.call_spec.in_spec
    args_spec, kwargs_spec = in_spec.children()
    keywords = tuple(str(key) for key in kwargs_spec.context or ())
    count = args_spec.num_children
    recorded = program.module_call_graph[0].signature
    names = list((recorded.forward_arg_names if recorded else None) or [])[:count]
    positional = tuple(names + [f"args[{i}]" for i in range(len(names), count)])
    specs = tuple(args_spec.children()) + tuple(kwargs_spec.children())
    called = dimension_names(program)
    return Signature(
        positional=positional,
        keywords=keywords,
        specs=specs,
        leaves=tuple(_leaves(program, positional + keywords, specs, called)),
        bounds={
            renamed(symbol, called): (
                int(bound.lower) if bound.lower.is_Integer else 0,  # -int_oo for a number that is read from data
                int(bound.upper) if bound.upper.is_Integer else None,
            )
            for symbol, bound in program.range_constraints.items()
        },
    )


def _leaves(
    program: ExportedProgram,
    names: tuple[str, ...],
    specs: tuple[pytree.TreeSpec, ...],
    called: Mapping[sympy.Symbol, str],
) -> Iterator[Leaf]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    paths = [name + path for name, spec in zip(names, specs, strict=True) for path in _paths(spec)]
    for path, spec in zip(paths, inputs, strict=True):
        value = None if isinstance(spec.arg, ConstantArgument) else nodes[spec.arg.name].meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = tuple(renamed(s.node.expr, called) if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
            yield Leaf(path, value.dtype, sizes)
        elif isinstance(value, torch.SymInt):
            yield Leaf(path, None, (renamed(value.node.expr, called),))
        else:
            yield Leaf(path, None, (), spec.arg.value if isinstance(spec.arg, ConstantArgument) else value)


def _paths(spec: pytree.TreeSpec) -> list[str]:
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _type_of(spec: pytree.TreeSpec) -> type | None:
    """The class of a container; None for a leaf."""
    # The spec of a namedtuple holds no class, but the function `namedtuple`.
    return spec.type if spec.type is None or isinstance(spec.type, type) else tuple


def _is_call(batch: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a batch is the pair `(args, kwargs)`."""
    return isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict)


def _has_structure(value: Any, spec: pytree.TreeSpec) -> bool:
    """Whether `value` can be read as `spec`, and none of its leaves is then a container."""
    flat: list[Any] = []
    try:
        _conform(value, spec, Place(None), flat)
    except BatchError:
        return False
    return not any(isinstance(leaf, (tuple, list, dict)) for leaf in flat)


def _conform(value: Any, spec: pytree.TreeSpec, at: Place, flat: list[Any]) -> None:
    """Append the leaves of `value`, read as `spec`. Container types may differ: collate functions turn tuples into
    lists, and tokenizers give mappings that are not dicts."""
    if spec.is_leaf():
        flat.append(value)
        return
    children, container = spec.children(), _type_of(spec)
    assert container is not None
    if issubclass(container, dict):
        keys = list(spec.context[1] if spec.type.__name__ == "defaultdict" else spec.context)
        if not isinstance(value, Mapping) or set(value) != set(keys):
            came = f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise BatchError(f"{at}: expected a dict with keys {sorted(map(str, keys))}, got {came}. {at.hint}")
        items = [value[key] for key in keys]
    elif issubclass(container, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(children):
            came = f"{len(value)} items" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
            raise BatchError(f"{at}: expected a {spec.type.__name__} of {len(children)} items, got {came}. {at.hint}")
        items = list(value)
    else:
        leaves, came_spec = pytree.tree_flatten(value)
        if came_spec != spec:
            raise BatchError(f"{at}: expected a {spec.type.__name__}, got {type(value).__name__}. {at.hint}")
        flat.extend(leaves)
        return
    for position, (item, child) in enumerate(zip(items, children, strict=True)):
        _conform(item, child, at.of(f"{at.argument}[{position}]"), flat)


def numbered(
    dataloader: Iterable[Any],
    signature: Signature,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    first: int = 0,
) -> Iterator[tuple[int, Any, FlatInputs]]:
    """Number the batches of `dataloader` from `first` on: (index, the batch as it came, the program's flat inputs).

    A batch, or what `transform` returns, may be a `NewSequence`; then `begins` of its flat inputs is true.

    Raises BatchError when the dataloader or `transform` raises, when a batch does not match, or when none comes.
    """
    if max_batches is not None and max_batches < 1:
        raise BatchError(f"max_batches={max_batches}: give at least 1, or None for all")
    try:
        batches = iter(dataloader)
    except TypeError as error:
        raise BatchError(f"the dataloader is a {type(dataloader).__name__}, which cannot be iterated") from error
    except Exception as error:
        raise BatchError(
            f"the dataloader raised {type(error).__name__} before batch 0: {error}{raised_at(error)}"
        ) from error
    index = first
    while max_batches is None or index < max_batches:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except CalibcastError:
            raise
        except Exception as error:
            raise BatchError(
                f"the dataloader raised {type(error).__name__} at batch {index}, after "
                f"{counted(index, 'good batch')}: {error}{raised_at(error)}"
            ) from error
        yield index, batch, _flat(signature, transform, batch, index)
        index += 1
    if index == 0:
        raise BatchError("the dataloader gave no batch: it is empty, or an iterator that was used up before")


def _flat(signature: Signature, transform: Callable[[Any], Any] | None, batch: Any, index: int) -> FlatInputs:
    begins, batch = unwrapped(batch)
    begins_too, inputs = unwrapped(_transformed(transform, batch, index))
    return FlatInputs(signature.flatten(inputs, index), begins or begins_too)


def _transformed(transform: Callable[[Any], Any] | None, batch: Any, index: int) -> Any:
    if transform is None:
        return batch
    try:
        return transform(batch)
    except Exception as error:
        raise BatchError(
            f"transform raised {type(error).__name__} on batch {index} (a {type(batch).__name__}): {error}"
            f"{raised_at(error)}"
        ) from error
