"""`recorded`: records what a module is called with while the user's own pipeline runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from calibcast.calib.artifacts import load_json, save_json
from calibcast.calib.call_files import load_call, save_call, size_of_call
from calibcast.calib.errors import ArtifactError, CalibcastError, StorageError
from calibcast.calib.sequences import NewSequence
from torch import nn

_log = logging.getLogger("calibcast")
_MANIFEST, _KIND = "calls.json", "recorded calls"
WHEN_FULL = ("thin", "stop")
GIB = 1 << 30
Recordable = nn.Module | Callable[..., Any]  # a module, or a method of one


class RecordedCalls:
    """The recorded calls of one module: a dataset of `(args, kwargs)`, as `calibrate` and the others take it.

    A call that begins a new sequence comes as `NewSequence((args, kwargs))`. Tensors are on the host.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Read what `recorded` wrote. Raises ArtifactError for a folder that is something else."""
        self.folder = Path(folder)
        load_json(self.folder / _MANIFEST, _KIND)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return len(self._files())

    def __getitem__(self, number: int) -> Any:
        files = self._files()
        if not -len(files) <= number < len(files):
            raise IndexError(f"there are {len(files)} recorded calls in {self.folder}; there is no {number}")
        begins, args, kwargs = load_call(files[number])
        return NewSequence((args, kwargs)) if begins else (args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"RecordedCalls({str(self.folder)!r}, {len(self)} calls)"


class Recorder(RecordedCalls):
    """The calls of one module while they are being recorded."""

    def __init__(self, folder: Path, budget: int, when_full: str) -> None:
        made = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not made:
            raise ArtifactError(f"{folder} exists and is not empty: record into another folder, or remove it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error}") from error
        save_json(folder / _MANIFEST, _KIND, {"when_full": when_full})
        super().__init__(folder)
        self._budget, self._when_full = budget, when_full
        self._lock = threading.Lock()
        self._sizes: dict[int, int] = {}
        self._seen, self._every, self._begins, self._full = 0, 1, True, False

    def new_sequence(self) -> None:
        """Say that the next call begins a new sequence, such as the first step of another prompt."""
        self._begins = True

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write one call, or leave it out where the budget is spent. Raises CalibcastError for what cannot be kept."""
        with self._lock:
            number, begins = self._seen, self._begins
            self._seen, self._begins = self._seen + 1, False
            if self._full or (number % self._every and not begins):
                return
            size = size_of_call(args, kwargs)
            while sum(self._sizes.values()) + size > self._budget and not self._make_room(number):
                pass
            if not self._full and (number % self._every == 0 or begins):
                self._sizes[number] = save_call(self._file(number), begins, args, kwargs)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def _make_room(self, number: int) -> bool:
        """Keep only every second call, of those recorded and of those to come; True where no call is left to drop."""
        if self._when_full == "stop" or len(self._sizes) < 2:
            self._full = True
            _log.warning(
                "%s is full (%d bytes): call %d and later ones are left out", self.folder, self._budget, number
            )
            return True
        self._every *= 2
        for one in [n for n in self._sizes if n % self._every]:
            self._file(one).unlink()
            del self._sizes[one]
        _log.info("%s: from here on every %dth call is kept", self.folder, self._every)
        return False


@contextmanager
def recorded(
    module: Recordable | Mapping[str, Recordable],
    folder: str | PathLike[str],
    max_bytes: int = GIB,
    when_full: str = "thin",
) -> Iterator[Any]:
    """Record what a module, or several, are called with in this block, while the user's own code calls them.

        with calibcast.recorded(pipeline.unet, "calls") as calls:
            pipeline("a lighthouse")
        ranges = calibcast.calibrate(program, calls)

    Args:
        module: a module; a method of one (`pipeline.vae.decode`), which is replaced while the block runs; or a
            mapping of names to these.
        folder: where the calls go, one file each; with several modules, each has a folder of its name. New or empty.
        max_bytes: the limit for all files of one module.
        when_full: "thin" leaves out every other call, of those kept and of those to come, so that what is kept spreads
            over the whole run (all timesteps of a denoiser); "stop" keeps the first calls, one after another, which
            programs with state need.

    Yields:
        `RecordedCalls`, a dataset for `calibrate`, `tune`, `verify` and the job, with `new_sequence()` for the user to
        say that another sequence begins; for several modules, a dict of these by name.

    Raises:
        ArtifactError: the folder is in use. CalibcastError: an argument is neither a tensor nor plain data.
    """
    if when_full not in WHEN_FULL:
        raise CalibcastError(f"when_full={when_full!r}: known are {', '.join(map(repr, WHEN_FULL))}")
    several = isinstance(module, Mapping)
    targets: Mapping[str, Recordable] = module if isinstance(module, Mapping) else {"": module}
    places = {name: Path(folder) / name if several else Path(folder) for name in targets}
    if bad := [name for name in targets if several and (not name or Path(name).name != name)]:
        raise CalibcastError(f"{bad[0]!r} cannot be the name of a folder: name each module with a plain word")
    with ExitStack() as stack:
        recorders = {name: Recorder(place, max_bytes, when_full) for name, place in places.items()}
        for name, target in targets.items():
            stack.enter_context(_watched(target, recorders[name]))
        yield recorders if several else recorders[""]


@contextmanager
def _watched(target: Recordable, recorder: Recorder) -> Iterator[None]:
    if isinstance(target, nn.Module):
        handle = target.register_forward_pre_hook(lambda _, a, k: recorder.take(a, k), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    owner, name = getattr(target, "__self__", None), getattr(target, "__name__", "")
    if not isinstance(owner, nn.Module):
        raise CalibcastError(f"recorded takes a module or a method of one, and got a {type(target).__name__}")

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.take(args, kwargs)
        return target(*args, **kwargs)

    before = vars(owner).get(name)
    vars(owner)[name] = call
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
