"""Read a pickle as a description, without running any of it.

A pickle is a program for a small stack machine. The machine here knows the opcodes that `torch.save` writes for
tensors, plain containers and instances of classes, and refuses all others. It only builds descriptions: it turns a call
into a `Made`, and calls nothing. So every call is known before a real unpickler sees the bytes.

Opcodes and their meaning: CPython's pickletools.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from calibcast.calib.pt2.refusal import RefusedError, shown

MOST_OPCODES = 5_000_000


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names: `module` and `name` as written."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """The description of a call. how: `call` for a function, `new` for an instance made without its constructor."""

    by: Named
    arguments: tuple[Any, ...]
    how: str
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Outside:
    """A reference to something outside the pickle: for torch, a storage."""

    key: Any


_MARK = object()
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    (
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    )
)  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IDLE = frozenset({"PROTO", "FRAME"})


def read_pickle(content: bytes, allowed: Callable[[Named], bool]) -> Any:
    """What a pickle describes. Raises RefusedError for an opcode or name that is not allowed, or a damaged pickle."""
    machine = _Machine(allowed)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST_OPCODES:
                raise RefusedError(f"a pickle of more than {MOST_OPCODES} opcodes")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except RefusedError:
        raise
    except Exception as error:  # truncated bytes, an empty stack, a key that cannot be hashed, wild numbers
        raise RefusedError(f"a damaged pickle: {type(error).__name__}: {shown(str(error))}") from error
    raise RefusedError("a pickle without an end")


class _Machine:
    def __init__(self, allowed: Callable[[Named], bool]) -> None:
        self._allowed = allowed
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        (value,) = self._stack
        if value is _MARK:
            raise RefusedError("a damaged pickle: it ends within a list")
        return value

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _VALUES:
            self._stack.append(_VALUES[opcode])
        elif opcode in _EMPTY:
            self._stack.append(_EMPTY[opcode]())
        elif opcode in _FIXED_TUPLES:
            self._stack.append(tuple(reversed([self._pop() for _ in range(_FIXED_TUPLES[opcode])])))
        elif opcode not in _IDLE:
            action = getattr(self, f"_do_{opcode.lower()}", None)
            if action is None:
                raise RefusedError(f"the pickle opcode {opcode}, which torch does not write for tensors")
            action(argument)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise RefusedError("a damaged pickle: a mark where a value belongs")
        return value

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _since_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("a pickle that names a class by something else than text")
        named = Named(module, name)
        if not self._allowed(named):
            raise RefusedError(f"a pickle that wants {shown(str(named))}")
        self._stack.append(named)

    def _do_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _do_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _do_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _do_binpersid(self, _: Any) -> None:
        self._stack.append(Outside(self._pop()))

    def _do_reduce(self, _: Any) -> None:
        self._make("call")

    def _do_newobj(self, _: Any) -> None:
        self._make("new")

    def _make(self, how: str) -> None:
        arguments, by = self._pop(), self._pop()
        if not isinstance(by, Named) or not isinstance(arguments, tuple):
            raise RefusedError("a pickle that calls what it has made")
        self._stack.append(Made(by, arguments, how))

    def _do_build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Made):
            raise RefusedError("a pickle that sets attributes of something that it did not make")
        target.states.append(state)

    def _do_append(self, _: Any) -> None:
        value = self._pop()
        self._extend([value])

    def _do_appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        (target.items if isinstance(target, Made) else _exactly(list, target)).extend(values)

    def _do_setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _do_setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, Made):
            target.items.extend(pairs)
        else:
            _exactly(dict, target).update(pairs)

    def _do_additems(self, _: Any) -> None:
        values = self._since_mark()
        _exactly(set, self._top()).update(values)

    def _do_binput(self, argument: int) -> None:
        self._memo[argument] = self._top()

    _do_long_binput = _do_binput

    def _do_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _do_binget(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    _do_long_binget = _do_binget


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise RefusedError(f"a pickle that fills a {type(value).__name__} as if it were a {kind.__name__}")
    return value
