"""From whatever a dataloader gives to the flat inputs of a program, or an error that says what did not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from calibcast.calib.errors import BatchError, CalibcastError, known
from calibcast.calib.graph import dtype_name
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

_MISSING = object()
_HINT = "Give transform=, a function from your batch to the model's inputs."


@dataclass(frozen=True)
class Leaf:
    """One flat input of a program: a tensor with its sizes (int or sympy expression), or a constant.

    An integer that the export left open has no dtype and one size: itself.
    """

    name: str
    dtype: torch.dtype | None
    sizes: tuple[Any, ...]
    constant: Any = None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"an int {self.sizes[0]}" if self.sizes else f"the constant {self.constant!r}"
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.sizes))}]"


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
        """The flat inputs that `batch` means. Raises BatchError that names batch, argument and what came."""
        at = f"batch {index}"
        values = self._by_argument(batch, at)
        flat: list[Any] = []
        for name, value, spec in zip(self.names, values, self.specs, strict=True):
            if value is _MISSING:
                flat.extend(self._constants(name, spec, len(flat), at))
            else:
                _conform(value, spec, f"{at}, argument {name}", flat)
        for leaf, value in zip(self.leaves, flat, strict=True):
            _check_leaf(leaf, value, f"{at}, argument {leaf.name}")
        sizes = _sizes_of_symbols(zip(self.leaves, flat, strict=True))
        for leaf, value in zip(self.leaves, flat, strict=True):
            _check_sizes(leaf, value, sizes, self.bounds, f"{at}, argument {leaf.name}")
        return flat

    def _by_argument(self, batch: Any, at: str) -> list[Any]:
        args, kwargs = self._as_call(batch, at)
        if len(args) > len(self.positional):
            raise BatchError(
                f"{at}: got {len(args)} inputs, but the program takes {len(self.positional)} by position: {self}. "
                f"{_HINT} For a (inputs, label) pair: transform=lambda batch: batch[0]."
            )
        unknown = [key for key in kwargs if key not in self.names[len(args) :]]
        if unknown:
            raise BatchError(
                f"{at}: unknown input {unknown[0]!r} ({known(str(unknown[0]), self.names)}); the program takes "
                f"{self}. {_HINT} To pick columns: transform=lambda b: {{k: b[k] for k in {list(self.names)}}}."
            )
        values = list(args) + [_MISSING] * (len(self.names) - len(args))
        for key, value in kwargs.items():
            values[self.names.index(key)] = value
        return values

    def _as_call(self, batch: Any, at: str) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
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
            if _is_call(batch) and not (len(self.positional) == 2 and takes_sequence):
                return tuple(batch[0]), batch[1]
            if takes_sequence and len(self.positional) == 1 and not _holds_one_sequence(batch):
                return (batch,), {}
            return tuple(batch), {}
        if first is not None and isinstance(batch, first):
            return (batch,), {}  # a registered pytree node, such as a dataclass
        raise BatchError(f"{at} is a {type(batch).__name__}; the program takes {self}. {_HINT}")

    def _constants(self, name: str, spec: pytree.TreeSpec, start: int, at: str) -> list[Any]:
        """Stand in for an argument that was left out, which only constants of the export allow."""
        leaves = self.leaves[start : start + spec.num_leaves]
        if any(leaf.dtype is not None or leaf.sizes for leaf in leaves):
            raise BatchError(f"{at}: input {name!r} is missing; the program takes {self}. {_HINT}")
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
    return Signature(
        positional=positional,
        keywords=keywords,
        specs=specs,
        leaves=tuple(_leaves(program, positional + keywords, specs)),
        bounds={
            symbol: (
                int(bound.lower) if bound.lower.is_Integer else 0,  # -int_oo: a number read from data
                int(bound.upper) if bound.upper.is_Integer else None,
            )
            for symbol, bound in program.range_constraints.items()
        },
    )


def _leaves(program: ExportedProgram, names: tuple[str, ...], specs: tuple[pytree.TreeSpec, ...]) -> Iterator[Leaf]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    paths = [name + path for name, spec in zip(names, specs, strict=True) for path in _paths(spec)]
    for path, spec in zip(paths, inputs, strict=True):
        value = None if isinstance(spec.arg, ConstantArgument) else nodes[spec.arg.name].meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
            yield Leaf(path, value.dtype, sizes)
        elif isinstance(value, torch.SymInt):
            yield Leaf(path, None, (value.node.expr,))
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


def _holds_one_sequence(batch: tuple[Any, ...] | list[Any]) -> bool:
    return len(batch) == 1 and isinstance(batch[0], (tuple, list))


def _conform(value: Any, spec: pytree.TreeSpec, at: str, flat: list[Any]) -> None:
    """Append the leaves of `value`, read as `spec`: collate functions turn tuples into lists, and tokenizers
    give mappings that are no dicts."""
    if spec.is_leaf():
        flat.append(value)
        return
    children, container = spec.children(), _type_of(spec)
    assert container is not None
    if issubclass(container, dict):
        keys = list(spec.context[1] if spec.type.__name__ == "defaultdict" else spec.context)
        if not isinstance(value, Mapping) or set(value) != set(keys):
            came = f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise BatchError(f"{at}: expected a dict with keys {sorted(map(str, keys))}, got {came}. {_HINT}")
        items = [value[key] for key in keys]
    elif issubclass(container, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(children):
            came = f"{len(value)} items" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
            raise BatchError(f"{at}: expected a {spec.type.__name__} of {len(children)} items, got {came}. {_HINT}")
        items = list(value)
    else:
        leaves, came_spec = pytree.tree_flatten(value)
        if came_spec != spec:
            raise BatchError(f"{at}: expected a {spec.type.__name__}, got {type(value).__name__}. {_HINT}")
        flat.extend(leaves)
        return
    for position, (item, child) in enumerate(zip(items, children, strict=True)):
        _conform(item, child, f"{at}[{position}]", flat)


def _check_leaf(leaf: Leaf, value: Any, at: str) -> None:
    if leaf.dtype is None and leaf.sizes:
        if not isinstance(value, int):
            raise BatchError(f"{at}: expected {leaf}, got a {type(value).__name__}. {_HINT}")
        return
    if leaf.dtype is None:
        # A tensor compares element by element: only a plain True is equality.
        if value is not leaf.constant and (value == leaf.constant) is not True:
            came = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise BatchError(f"{at}: the program was exported with {leaf}, got {came}. Export it with that value.")
        return
    if not isinstance(value, torch.Tensor):
        raise BatchError(
            f"{at}: expected a tensor {leaf}, got a {type(value).__name__}. "
            "Convert it in transform=, or use .with_format('torch') of a datasets.Dataset."
        )
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise BatchError(f"{at}: expected {leaf}, got a {kind} tensor. Make it dense in transform=.")
    if value.dtype != leaf.dtype:
        came = f"{dtype_name(value.dtype)}{list(value.shape)}"
        raise BatchError(
            f"{at}: expected {leaf}, got {came}: another dtype. "
            f"Convert in transform=, for example .to(torch.{dtype_name(leaf.dtype)})."
        )
    if value.dim() != len(leaf.sizes):
        came = f"{dtype_name(value.dtype)}{list(value.shape)}"
        raise BatchError(f"{at}: expected {leaf}, got {came}: {value.dim()} dimensions, not {len(leaf.sizes)}.")


def _shape(leaf: Leaf, value: Any) -> tuple[int, ...]:
    """The sizes of an input of a batch, in the order of `leaf.sizes`."""
    if leaf.dtype is None:
        return (value,) if leaf.sizes else ()
    return tuple(value.shape)


def _sizes_of_symbols(inputs: Iterable[tuple[Leaf, Any]]) -> dict[Any, int]:
    """What each symbolic size is in this batch: what it is where it stands alone for the first time."""
    sizes: dict[Any, int] = {}
    for leaf, value in inputs:
        for expected, size in zip(leaf.sizes, _shape(leaf, value), strict=True):
            if not isinstance(expected, int) and expected.is_Symbol:
                sizes.setdefault(expected, size)
    return sizes


def _check_sizes(
    leaf: Leaf, value: Any, sizes: dict[Any, int], bounds: dict[Any, tuple[int, int | None]], at: str
) -> None:
    # An engine checks its inputs on every call, so what came is put into words only when it is wrong: printing a
    # tensor reads it, which on a GPU takes longer than many a network.
    for dimension, (expected, size) in enumerate(zip(leaf.sizes, _shape(leaf, value), strict=True)):
        if isinstance(expected, int):
            if size != expected:
                raise BatchError(
                    f"{at}: {_came(leaf, value, dimension)} is {size}, not {expected}. Export the program with that "
                    "dimension dynamic (dynamic_shapes=), or give batches of that size (DataLoader(drop_last=True) for "
                    "the last one)."
                )
            continue
        wanted = sizes[expected] if expected in sizes else expected.subs(sizes)
        if isinstance(wanted, (int, sympy.Integer)) and int(wanted) != size:
            came = _came(leaf, value, dimension)
            raise BatchError(f"{at}: {came} is {size}, but {expected} is {int(wanted)} in this batch.")
        low, high = bounds.get(expected, (0, None))
        if size < low or (high is not None and size > high):
            most = "infinity" if high is None else high
            came = _came(leaf, value, dimension)
            raise BatchError(f"{at}: {came} is {size}, outside the exported range {low} to {most} of {expected}.")


def _came(leaf: Leaf, value: Any, dimension: int) -> str:
    if not isinstance(value, torch.Tensor):
        return f"expected {leaf}, got {value}: it"
    return f"expected {leaf}, got {dtype_name(value.dtype)}{list(value.shape)}: dimension {dimension}"


def numbered(
    dataloader: Iterable[Any],
    signature: Signature,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    first: int = 0,
) -> Iterator[tuple[int, Any, list[Any]]]:
    """Number the batches of `dataloader` from `first` on: (index, the batch as it came, the program's flat inputs).

    Raises BatchError when the dataloader or `transform` raises, when a batch does not match, or when none comes.
    """
    if max_batches is not None and max_batches < 1:
        raise BatchError(f"max_batches={max_batches}: give at least 1, or None for all")
    try:
        batches = iter(dataloader)
    except TypeError as error:
        raise BatchError(f"the dataloader is a {type(dataloader).__name__}, which cannot be iterated") from error
    except Exception as error:
        raise BatchError(f"the dataloader raised {type(error).__name__} before batch 0: {error}") from error
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
                f"the dataloader raised {type(error).__name__} at batch {index}, after {index} good batches: {error}"
            ) from error
        yield index, batch, signature.flatten(_transformed(transform, batch, index), index)
        index += 1
    if index == 0:
        raise BatchError("the dataloader gave no batch: it is empty, or an iterator that was used up before")


def _transformed(transform: Callable[[Any], Any] | None, batch: Any, index: int) -> Any:
    if transform is None:
        return batch
    try:
        return transform(batch)
    except Exception as error:
        raise BatchError(
            f"transform raised {type(error).__name__} on batch {index} (a {type(batch).__name__}): {error}"
        ) from error
