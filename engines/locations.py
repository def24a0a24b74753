"""Locations of models and data on the command line: `model.pt2`, or `file.py:function`."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibcast.calib.artifacts import load_program
from calibcast.calib.errors import CalibcastError, ProgramError, first_line, known, raised_at
from calibcast.calib.file_kinds import PROGRAM_FILE, PYTHON, wrong_kind
from calibcast.calib.process_settings import own_output_kept, unlogged
from calibcast.engines import garbage
from calibcast.engines.lstm_states import right_lstm_states
from calibcast.engines.usage import LocationError

if TYPE_CHECKING:  # torch takes seconds to import; a wrong path is reported before that
    from torch.export import ExportedProgram


_STAMP = "__calibcast_file__"  # the file that a module was made from: path, modification time, size


def load_model(location: str, arguments: Mapping[str, Any] | None = None) -> ExportedProgram:
    """The program at `model.pt2`, or what `file.py:function` returns when called with `arguments`.

    The function gives an ExportedProgram, or `(module, args[, kwargs[, dynamic_shapes]])`, which is exported.
    Raises LocationError, ArtifactError or ProgramError.
    """
    check_model(location)
    import torch

    importlib.import_module("torch._dynamo")  # both torch.export.export and load import it, in many small files
    garbage.usual()  # what comes now is the user's own code
    if ":" not in location:
        if arguments:
            raise LocationError(f"{location} is a file, and takes no arguments; there are {sorted(arguments)}")
        return load_program(location)
    made = call(location, arguments)
    if isinstance(made, torch.export.ExportedProgram):
        return made
    if isinstance(made, tuple) and 2 <= len(made) <= 4 and isinstance(made[0], torch.nn.Module):
        module, args, kwargs, shapes = made + (None,) * (4 - len(made))
        try:
            with _quiet(), right_lstm_states():
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:  # errors of torch.export have no common base class
            raise ProgramError(
                f"torch.export cannot export what {location} returned: {type(error).__name__}: "
                f"{first_line(error)}{_place(error)}"
            ) from error
    raise ProgramError(
        f"{location} returned a {type(made).__name__}; expected an ExportedProgram or "
        "(module, args[, kwargs[, dynamic_shapes]])"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what torch logs and prints when an export fails, since the error that it raises says the same. If the
    export succeeds, what was printed meanwhile goes to stderr."""
    with unlogged("torch"), own_output_kept() as said:
        yield
    sys.stderr.write(said.getvalue())


def _place(error: Exception) -> str:
    """The line of the user's model that torch names at the end of its message."""
    places = re.findall(r'File "([^"\n]+)", line (\d+)', str(error))
    return f" ({places[-1][0]}:{places[-1][1]})" if places else ""


def check_model(location: str) -> None:
    """Raise LocationError when there is no such file. It runs before torch is imported, which takes seconds."""
    if ":" in location:
        check_location(location)
    elif Path(location).exists() and (wrong := wrong_kind(Path(location), PROGRAM_FILE)) is not None:
        raise LocationError(f"{wrong}: MODEL is a .pt2 file or file.py:function")
    elif not location.endswith(".pt2"):
        raise LocationError(f"MODEL is {location!r}: give a .pt2 file or file.py:function")
    elif not Path(location).is_file():
        raise LocationError(f"{location}: no such file; expected a .pt2 written by torch.export.save")


def check_location(location: str) -> Path:
    """The file in `file.py:function`. Raises LocationError for a location of another form, or when there is no such
    file."""
    file, _, name = location.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier() or path.suffix != ".py":
        raise LocationError(f"{location!r} is no location: give file.py:function")
    if not path.exists():
        raise LocationError(f"{location!r}: there is no file {path}")
    if (wrong := wrong_kind(path, PYTHON)) is not None:
        raise LocationError(wrong)
    _check_name(path, name)
    return path


def _check_name(path: Path, name: str) -> None:
    """Raise LocationError where the file's text binds no such name. It is parsed, not run: that would import torch."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing it says what is wrong, and where
        return
    bound = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    bound |= {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if name in bound or "*" in bound or read & {"globals", "exec", "setattr"}:
        return
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    raise LocationError(f"{path} has no function {name!r}; {known(name, functions)}")


def load_data(location: str) -> Iterable[Any]:
    """What the function at `file.py:function` returns: a dataloader, or any iterable of batches."""
    path, name = check_location(location), location.rpartition(":")[2]
    made: Any = getattr(_imported(path), name, None)
    # A list of batches or a DataLoader with that name serves as well as a function that returns one.
    what = "is" if made is not None and not callable(made) else "returned"
    made = made if what == "is" else call(location)
    if isinstance(made, str) or not (hasattr(made, "__iter__") or hasattr(made, "__getitem__")):
        raise CalibcastError(
            f"{location} {what} a {type(made).__name__}, which cannot be iterated over batches: give a function "
            "that returns a DataLoader, or another iterable of batches"
        )
    found: Iterable[Any] = made
    return found


def call(location: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Call the function at `file.py:function` with keyword arguments. An error that it raises is reported with its file
    and line."""
    function = load_function(location)
    given = dict(arguments or {})
    _check_arguments(location, function, given)
    try:
        return function(**given)
    except CalibcastError:
        raise
    except Exception as error:
        raise CalibcastError(f"{location} raised {type(error).__name__}: {error}{raised_at(error)}") from error


def _check_arguments(location: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        raise LocationError(
            f"{location}{signature} cannot be called with {', '.join(map(repr, given)) or 'no arguments'}: {error}"
        ) from error


def load_function(location: str) -> Callable[..., Any]:
    """The function at `file.py:function`. Raises LocationError when there is none."""
    path, name = check_location(location), location.rpartition(":")[2]
    module = _imported(path)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LocationError(f"{path} has no function {name!r}; {known(name, names)}")
    found: Callable[..., Any] = function
    return found


def _imported(path: Path) -> Any:
    """The module of a user's file. It is imported once, even if several of its functions are used."""
    place = path.resolve()
    stamp = (str(place), place.stat().st_mtime_ns, place.stat().st_size)
    # Two files may have the same stem, so the name contains a hash of the path. It is the same in a worker process.
    name = f"calibcast_user_{path.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    known_module = sys.modules.get(name)
    if known_module is not None and getattr(known_module, _STAMP, None) == stamp:
        return known_module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _STAMP, stamp)
    sys.modules[name] = module  # dataclasses and worker processes look their module up by name
    # The file can import the files beside it, as if it were run as a script. Their folder comes last in the search
    # path, so that a `datasets.py` there does not hide the package.
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise CalibcastError(f"{path} cannot be imported: {type(error).__name__}: {error}{raised_at(error)}") from error
    return module


@contextmanager
def exits_refused() -> Iterator[None]:
    """Inside the block, a call of `sys.exit` in a user's function is an error: it must not end a job, above all not
    with code 0.
    """
    try:
        yield
    except SystemExit as error:
        raise CalibcastError(
            f"a function of yours called sys.exit({error.code!r}){raised_at(error)}: let it raise an error instead"
        ) from error
