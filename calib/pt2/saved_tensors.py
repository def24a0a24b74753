"""What `torch.save` wrote: a zip with one pickle and the bytes of its storages. Tensors and plain containers only."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from calibcast.calib.pt2.archive import members
from calibcast.calib.pt2.pickles import Made, Named, Outside, read_pickle
from calibcast.calib.pt2.refusal import RefusedError, allowed_by_owner, how_to_allow, shown

_DATA, _STORAGES = "data.pkl", "data/"
_REBUILD = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"})
_REBUILD_BYTES = "torch._utils._rebuild_tensor_v3"  # from a storage of bytes: float8, uint16
_FAKE = "torch._export.serde.serialize._reconstruct_fake_tensor"
# Whatever their arguments are, these give a tensor, a container or a number.
_HARMLESS = _REBUILD | {
    _REBUILD_BYTES,
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.device",
    "collections.OrderedDict",
    "builtins.complex",
    "builtins.set",
    "__builtin__.complex",
    "__builtin__.set",
    "_codecs.encode",
    _FAKE,
}
_UNTYPED = "torch.storage.UntypedStorage"


def check_saved(content: bytes, reader: Callable[[bytes], Any], check_meta: Callable[[Any], None]) -> None:
    """Raise RefusedError unless `content` is what `torch.save` writes of tensors, plain containers and allowed classes.

    reader: opens the archive as torch does, so that the pickle seen here is the one that torch will see.
    check_meta: checks the JSON that describes a fake tensor.
    """
    sizes = members(io.BytesIO(content))
    record = reader(content)
    if set(record.get_all_records()) != set(sizes):
        raise RefusedError("an archive of tensors that zipfile and torch read differently")
    if _DATA not in sizes:
        raise RefusedError("an archive of tensors without data.pkl")
    described = read_pickle(record.get_record(_DATA), _Names())
    for made in _walk(described):
        if isinstance(made, Outside):
            _storage(made, sizes)
        elif str(made.by) in _REBUILD or str(made.by) == _REBUILD_BYTES:
            _check_tensor(made, sizes)
        elif str(made.by) == _FAKE:
            check_meta(json.loads(made.arguments[0]))


class _Names:
    """Which names a pickle may hold: some of torch's own, and classes that this process or the owner vouches for."""

    def __init__(self) -> None:
        self._owner = allowed_by_owner()
        self._registered = registered_classes()

    def __call__(self, named: Named) -> bool:
        text = str(named)
        if text in _HARMLESS or _element_size(named) is not None or _is_dtype(named):
            return True
        if text in self._owner or text in self._registered:
            return True
        raise RefusedError(f"a pickle that wants {shown(text)}, no tensor or plain container. {how_to_allow(text)}")


def registered_classes() -> frozenset[str]:
    """Classes that this process has registered as input containers, such as by `torch.export.register_dataclass`."""
    import torch.utils._pytree as pytree

    return frozenset(
        f"{kind.__module__}.{kind.__qualname__}" for kind in pytree.SUPPORTED_NODES if kind.__module__ != "builtins"
    )


def _walk(described: Any) -> Iterator[Any]:
    """Every `Made` and `Outside` of a description, once. A list in a pickle may contain itself."""
    seen: set[int] = set()
    waiting = [described]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple, set, dict, Made, Outside)):
            if id(value) in seen:
                continue
            seen.add(id(value))
        if isinstance(value, Made):
            waiting += [*value.arguments, *value.states, *value.items]
            yield value
        elif isinstance(value, Outside):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += list(value)


def _check_tensor(made: Made, sizes: dict[str, int]) -> None:
    """A tensor must lie within its storage: otherwise torch would enlarge the storage to any size."""
    storage, offset, shape, strides = made.arguments[:4]
    if not isinstance(storage, Outside) or not all(isinstance(value, tuple) for value in (shape, strides)):
        raise RefusedError("a tensor that is made of something else than a storage, a shape and strides")
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise RefusedError(f"a tensor of shape {shown(shape)} and strides {shown(strides)}")
    width, held = _storage(storage, sizes)
    if str(made.by) == _REBUILD_BYTES:
        width = _dtype_size(made.arguments[6])
    needed = 0 if 0 in shape else 1 + offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if needed * width > held:
        raise RefusedError(f"a tensor of shape {shown(shape)} that reaches beyond its storage of {held} bytes")


def _storage(outside: Outside, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of one element, and bytes in the archive, of `("storage", type, key, location, elements)`."""
    key = outside.key
    if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage":
        raise RefusedError(f"a pickle that refers to {shown(key)}, which is not a storage")
    _, kind, name, location, elements = key
    width = _element_size(kind) if isinstance(kind, Named) else None
    if width is None or not isinstance(name, str) or not isinstance(location, str) or type(elements) is not int:
        raise RefusedError(f"a storage that is described as {shown(key)}")
    held = sizes.get(f"{_STORAGES}{name}")
    if held is None or elements < 0 or elements * width != held:
        raise RefusedError(f"a storage of {elements} elements of {width} bytes, where the archive holds {held} bytes")
    return width, held


def _element_size(named: Named) -> int | None:
    """Bytes of an element, if `named` is one of torch's storage classes; None for any other name."""
    import torch

    if str(named) == _UNTYPED:
        return 1
    if named.module not in ("torch", "torch.cuda") or not named.name.endswith("Storage") or "." in named.name:
        return None
    dtype = torch.storage._storage_type_to_dtype_map().get(named.name)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None


def _dtype_size(named: Any) -> int:
    import torch

    if not isinstance(named, Named) or not _is_dtype(named):
        raise RefusedError(f"a tensor of the element type {shown(named)}")
    return int(vars(torch)[named.name].itemsize)


def _is_dtype(named: Named) -> bool:
    import torch

    return named.module == "torch" and isinstance(vars(torch).get(named.name), torch.dtype)
