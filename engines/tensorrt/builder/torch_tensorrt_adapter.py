"""The one place that knows Torch-TensorRT's public side: its import, its flavours, its keyword names from 2.11 to 2.14.

It uses only public calls: `torch_tensorrt.dynamo.compile`, `Input`, `save`, `load`. What changed between the supported
versions:

- 2.11: `use_explicit_typing` is a keyword (on by default), and weak typing (`enabled_precisions`) is still there
  where the TensorRT underneath has it, which is up to 10.x and never TensorRT-RTX.
- 2.14: both keywords are gone; typing is always explicit.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from calibcast.calib.errors import BuildError, known
from calibcast.engines.tensorrt.builder.job import Profile

FLAVOURS = {"torch-tensorrt": "tensorrt", "torch-tensorrt-rtx": "rtx"}  # distribution -> our extra
# Settings that only some versions have, and what they need.
_NEEDS = {
    "build_route": "TensorRT's Global Performance Tuner needs TensorRT 11.1 (not TensorRT-RTX) and a Torch-TensorRT "
    "after 2.14, which takes its route under this name"
}
# Where a newer TensorRT installs beside a Torch-TensorRT that does not work with it: what to do.
_MADE_FOR = {("torch-tensorrt-rtx", "2.11"): ". It was made for TensorRT-RTX 1.4: pip install "
             "'tensorrt-rtx==1.4.0.76' 'tensorrt-rtx-cu13==1.4.0.76', or take torch 2.14"}  # fmt: skip
_PLUGINS = "tensorrt_rtx_bindings.plugin"
# The module that asks which distribution it is of.
_ASKS = "torch_tensorrt._TensorRTProxyModule"
INSTALL = "pip install 'calibcast[rtx]' for TensorRT-RTX, or 'calibcast[tensorrt]' for TensorRT; never both"


def installed_flavour() -> tuple[str, str] | None:
    """(distribution, version) of the Torch-TensorRT that is installed; None where there is none.

    Both flavours import as `torch_tensorrt`, so only the distributions tell them apart.
    """
    for distribution in FLAVOURS:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def absent() -> str | None:
    """As `missing`, but without the seconds that it takes to import Torch-TensorRT: it may still not import."""
    found = installed_flavour()
    if found is None:
        return f"Torch-TensorRT is not installed: {INSTALL}"
    if not torch.cuda.is_available():
        return f"{found[0]} {found[1]} is installed, but torch sees no CUDA GPU"
    return None


def missing() -> str | None:
    """Why Torch-TensorRT cannot be used here, and what to do; None when it can."""
    if (problem := absent()) is not None:
        return problem
    try:
        load_package()
    except BuildError as error:
        return str(error)
    return None


@cache
def load_package() -> Any:
    """`torch_tensorrt`, imported. Raises BuildError when it is missing or does not import."""
    found = installed_flavour()
    if found is None:
        raise BuildError(f"Torch-TensorRT is not installed: {INSTALL}")
    _pass_over_missing_plugins()
    try:
        with _told_its_distribution(found[0]):
            return importlib.import_module("torch_tensorrt")
    except Exception as error:  # its import loads libraries and asks the driver, so it can raise anything
        beside = ", ".join(f"{name} {version}" for name, version in package_versions().items() if name != found[0])
        raise BuildError(
            f"{found[0]} {found[1]} is installed but does not import with {beside or 'what is installed beside it'}: "
            f"{type(error).__name__}: {error}{_MADE_FOR.get((found[0], found[1][:4]), '')}"
        ) from error


def _pass_over_missing_plugins() -> None:
    """Let `tensorrt.plugin` count as missing where its binding is. TensorRT-RTX (1.4 to 1.7) has the folder without the
    binding that it imports, and Torch-TensorRT 2.11 fails to import when it looks whether plugins are there."""
    if "tensorrt.plugin" not in sys.modules and _found("tensorrt_rtx_bindings") and not _found(_PLUGINS):
        sys.modules["tensorrt.plugin"] = None  # type: ignore[assignment]  # Python's own mark of a missing module


@contextmanager
def _told_its_distribution(distribution: str) -> Iterator[None]:
    """Tell Torch-TensorRT, as it is imported in this block, which distribution brought it.

    It would look for every file of every distribution, which takes 1.6 to 2.5 s of an import of 5 (Python 3.12, 83
    distributions). Others, such as transformers, are told of all distributions.
    """
    look = metadata.packages_distributions

    def packages_distributions() -> Mapping[str, list[str]]:
        asker = sys._getframe(1).f_globals.get("__name__")
        return {"torch_tensorrt": [distribution]} if asker == _ASKS else look()

    with mock.patch.object(metadata, "packages_distributions", packages_distributions):
        yield


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def compile_program(
    program: torch.export.ExportedProgram,
    arg_inputs: Any,
    kwarg_inputs: Any,
    settings: dict[str, Any],
    weakly_typed: frozenset[torch.dtype] | None = None,
) -> Any:
    """Build `program` in exactly the types of its graph. Returns a `torch.fx.GraphModule` with engines in it.

    `weakly_typed` names the types that TensorRT may choose from, where the installed version still does that.
    """
    package = load_package()
    compiler = package.dynamo.compile
    names = setting_names()
    check_setting_names(settings, names)
    typing: dict[str, Any] = {}
    if "use_explicit_typing" in names:
        typing["use_explicit_typing"] = weakly_typed is None
    if weakly_typed is not None:
        _require_weak_typing(names)
        typing["enabled_precisions"] = set(weakly_typed)
    return compiler(program, arg_inputs=arg_inputs, kwarg_inputs=kwarg_inputs, **{**typing, **settings})


def _require_weak_typing(names: set[str]) -> None:
    found = installed_flavour()
    is_rtx = found is not None and found[0] == "torch-tensorrt-rtx"
    if is_rtx or "use_explicit_typing" not in names:
        raise BuildError(
            f"weak typing (use_explicit_typing=False) is not in {' '.join(found or ('Torch-TensorRT',))}: TensorRT 11 "
            "and TensorRT-RTX run a network in exactly the types of its graph. Use use_explicit_typing=True, "
            "enable_autocast=True, and calibcast spells the types out."
        )


def input_spec(shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Any:
    """A `torch_tensorrt.Input` from the (smallest, most frequent, largest) shapes."""
    package = load_package()
    low, usual, high = shapes
    if low == high:
        return package.Input(shape=usual, dtype=dtype)
    return package.Input(min_shape=low, opt_shape=usual, max_shape=high, dtype=dtype)


def save_module(module: Any, path: str) -> None:
    """Write a compiled module as an exported program with its engines inside."""
    load_package().save(module, path, output_format="exported_program", retrace=False)


def load_module(path: str) -> Any:
    """Read back what `save_module` wrote, as a callable module."""
    return load_package().load(path).module()


def check_setting_names(settings: Iterable[str], names: set[str]) -> None:
    """Raise BuildError for a setting that is not among `names`, with similar names."""
    for name in settings:
        if name not in names:
            needs = f". {_NEEDS[name]}" if name in _NEEDS else f"; {known(name, names)}"
            raise BuildError(f"torch_tensorrt.dynamo.compile has no setting {name!r}{needs}")


def setting_names() -> set[str]:
    """The settings that `torch_tensorrt.dynamo.compile` takes, without importing it where that needs a GPU."""
    compiler = load_package().dynamo.compile
    return set(inspect.signature(compiler).parameters) - {"exported_program", "kwargs"}


def inspected(engine: bytes) -> tuple[str, dict[str, Profile]]:
    """The output of TensorRT's engine inspector for a serialised engine, as JSON, and the engine's own profile of each
    dynamic input. Needs a GPU, because it deserialises the engine."""
    load_package()  # binds the name `tensorrt` to the flavour that is installed
    trt = importlib.import_module("tensorrt")
    found = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine)
    if found is None:
        raise BuildError("TensorRT does not deserialise the engine: it is damaged, or of another version or GPU")
    text = str(found.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    names = [found.get_tensor_name(i) for i in range(found.num_io_tensors)]
    inputs = [name for name in names if found.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    dynamic = [n for n in inputs if -1 in tuple(found.get_tensor_shape(n)) and not found.is_shape_inference_io(n)]
    profiles = {name: read_profile(found.get_tensor_profile_shape(name, 0)) for name in dynamic}
    return text, profiles


def read_profile(shapes: Any) -> Profile:
    """TensorRT's (least, most frequent, largest) shape of an input as plain numbers."""
    least, usual, largest = (tuple(int(size) for size in shape) for shape in shapes)
    return least, usual, largest


def lifts_buffers() -> bool:
    """Whether the installed Torch-TensorRT makes inputs and outputs of the buffers that a program writes (2.14).
    Otherwise (2.11) they become constants of the engine, and what is written is lost."""
    return importlib.util.find_spec("torch_tensorrt.dynamo.lowering._buffer_lifting") is not None


def converts_index_copy() -> bool:
    """Whether the installed Torch-TensorRT converts `index_copy` itself (2.14), and does not make `index_put` of it."""
    return importlib.util.find_spec("torch_tensorrt.dynamo.conversion.impl.index_copy") is not None


# Distributions that bring TensorRT: Torch-TensorRT 2.14 requires `tensorrt-cu13`, and then `tensorrt` itself is not
# there.
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


def package_versions() -> dict[str, str]:
    """Versions of the flavour and of the TensorRT under it. The latter is called `tensorrt` or `tensorrt-rtx`, whatever
    the name of the distribution that brought it."""
    found = installed_flavour()
    versions = {} if found is None else {found[0]: found[1]}
    for library, names in _DISTRIBUTIONS.items():
        installed = (version for name in names if (version := _version(name)) is not None)
        if (version := next(installed, None)) is not None:
            versions[library] = version
    return versions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
