"""Files for other tools: ONNX beside what lies there, Triton's configuration, and paths that no system holds."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from calibcast.calib.artifacts import save_json
from calibcast.calib.errors import StorageError
from calibcast.engines import export_onnx
from calibcast.engines.cli import _run
from calibcast.engines.io_names import flat_output_names
from calibcast.engines.onnx_export import exporting
from calibcast.engines.streams import Messages
from calibcast.engines.triton_config import triton_config
from torch import Tensor, nn

from tests.functions import exported


class _Wide(nn.Module):
    """Its weights do not fit into the model's own file."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x)
        return made


X = torch.ones(2, 64)


def _write(path: Path, seed: int = 0) -> Tensor:
    model = _Wide(seed).eval()
    export_onnx(torch.export.export(model, (X,)), None, path)
    made: Tensor = model(X).detach()
    return made


def _ran(path: Path) -> Tensor:
    [given] = onnxruntime.InferenceSession(str(path)).run(None, {"x": X.numpy()})
    return torch.from_numpy(np.asarray(given))


def test_a_link_to_a_model_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "blob.onnx", tmp_path / "model.onnx"
    _write(real)
    link.symlink_to(real)
    made = _write(link, seed=1)
    assert link.is_symlink()
    assert torch.allclose(_ran(real), made, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "real")) == ["blob.onnx", "blob.onnx.data"]


def test_weights_that_are_a_link_are_replaced_and_what_it_points_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.onnx.data").symlink_to(tmp_path / "precious")
    made = _write(tmp_path / "model.onnx")
    assert (tmp_path / "precious").read_text() == "mine"
    assert torch.allclose(_ran(tmp_path / "model.onnx"), made, atol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.onnx.state.npz"])
def test_a_folder_in_the_place_of_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        _write(tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == [name]
    assert os.listdir(tmp_path / name) == []


def test_a_run_that_ends_between_two_files_leaves_no_old_model_with_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    _write(path)

    def killed(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(exporting.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(path, seed=1)
    assert not path.exists()


def test_a_full_disk_is_one_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*model\.onnx"):
            _write(tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_buffers_of_any_name_are_state(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("file", "/etc/up", "a b"):
                self.register_buffer(name, torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            for held in self.buffers():
                held.add_(x)
            return x * sum(self.buffers())  # type: ignore[return-value]

    export_onnx(torch.export.export(Counts(), (torch.ones(3),)), None, tmp_path / "net.onnx")
    with np.load(tmp_path / "net.onnx.state.npz", allow_pickle=False) as state:
        assert len(state.files) == 3
        assert all(name.isidentifier() for name in state.files)
        assert {value.shape for value in state.values()} == {(3,)}
    inputs = {value.name for value in onnx.load(tmp_path / "net.onnx").graph.input}
    assert inputs == {"x", *state.files}


def _io(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "binding": "x", "dtype": "bfloat16", "shape": ["batch", 4]}
    result = {"name": "out", "binding": "y", "dtype": "float16", "shape": ["2*batch", 4]}
    return {
        "library": "tensorrt", "state": [], "versions": {"tensorrt": "11.0"}, "gpu": "H200", "engine": "model.engine",
        "inputs": [{**tensor, **changes}], "outputs": [result],
    }  # fmt: skip


def test_tritons_configuration_has_every_size_and_type() -> None:
    text = str(triton_config(_io()))
    assert "data_type: TYPE_BF16\n    dims: [ -1, 4 ]" in text
    assert "data_type: TYPE_FP16\n    dims: [ -1, 4 ]" in text
    assert "  {  # out\n" in text
    scalar = str(triton_config(_io(shape=[])))
    assert "dims: [ 1 ]\n    reshape: { shape: [ ] }" in scalar
    assert triton_config(_io(dtype="float8_e4m3fn")) is None


HOSTILE = 'x"\nbackend: "python"\n# \\ \x1b[31m'


@pytest.mark.parametrize("field", ["name", "binding", "engine", "gpu", "versions"])
def test_no_name_writes_a_line_of_tritons_configuration(field: str) -> None:
    io = _io(**({field: HOSTILE} if field in {"name", "binding"} else {}))
    if field not in {"name", "binding"}:
        io[field] = {"tensorrt": HOSTILE} if field == "versions" else HOSTILE
    text = str(triton_config(io))
    assert "\x1b" not in text
    clean = str(triton_config(_io()))
    assert [line.split(":")[0] for line in text.splitlines() if not line.lstrip().startswith(("#", "{"))] == [
        line.split(":")[0] for line in clean.splitlines() if not line.lstrip().startswith(("#", "{"))
    ]
    assert text.count("\n") == clean.count("\n")


def test_quotes_in_tritons_configuration_are_those_of_its_text_format() -> None:
    text = str(triton_config(_io(binding='a"b\\c\nü\x07')))
    assert 'name: "a\\"b\\\\c\\012ü\\007"' in text


def test_a_name_without_letters_is_a_name() -> None:
    program = exported(lambda x: {"": x * 2, "\n": x * 3, "\x1b": x * 4}, X)
    names = flat_output_names(program)
    assert len(set(names)) == 3
    assert all(name.isidentifier() for name in names)


LONG = "x" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", LONG],
        ["plan", LONG, LONG],
        ["run", LONG],
        ["inspect", LONG],
        ["merge", LONG, "-o", "new"],
        ["diff", LONG, LONG],
        ["calibrate", f"{LONG}.py:f", "--data", f"{LONG}.py:f", "-o", "new"],
        ["calibrate", "m.py:f", "--data", "m.py:f", "-o", LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_no_system_holds_is_a_bad_command_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("def f(): return []\n")
    assert _run(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def _main(arguments: list[str], where: Path, after: str = "pass", **streams: Any) -> Any:
    """Run the command line in a process of its own. after: a check of what it left."""
    code = f"import sys\nfrom calibcast.engines.cli import main\ntry: main(sys.argv[1:])\nfinally: {after}"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=where, check=False, **streams)


def test_a_path_that_leads_in_a_circle_is_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "loop.parquet").symlink_to("loop.parquet")
    ran = _main(["report", "loop.parquet"], tmp_path, after="assert 'torch' not in sys.modules", capture_output=True)
    assert ran.returncode == 2, ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("end", [".toml", ".py:f"])
def test_a_huge_file_is_no_text_and_is_not_read(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with open(f"huge{end.removesuffix(':f')}", "wb") as file:
        file.truncate(5 << 30)
    arguments = ["run", "huge.toml"] if end == ".toml" else ["calibrate", "huge.py:f", "--data", "huge.py:f", "-o", "n"]
    assert _run(arguments) == 2
    assert "of 5120 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(("closed", "code"), [("1", 0), ("2", 0), ("0, 1, 2", 0)], ids=["stdout", "stderr", "all"])
def test_a_closed_stream_stops_nothing_and_no_file_takes_its_place(closed: str, code: int, tmp_path: Path) -> None:
    numbers = closed.split(", ")
    shell = " ".join(f"{number}>&-" if number != "0" else "0<&-" for number in numbers)
    script = "import sys; from calibcast.engines.cli import main; sys.exit(main(['init', 'night']))"
    command = f"'{sys.executable}' -c \"{script}\" {shell}; echo $? > code"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "code").read_text().strip() == str(code)
    assert (tmp_path / "night" / "job.toml").read_text().startswith("# A calibration job")


def test_a_full_stderr_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = _main(["report", "missing"], tmp_path, stderr=full)
        assert ran.returncode == 2
        ran = _main(["init", "night"], tmp_path, stderr=full, stdout=subprocess.PIPE)
    assert ran.returncode == 0
    assert b"wrote" in ran.stdout


def test_messages_are_lost_and_nothing_else_when_their_stream_is_full() -> None:
    with open("/dev/full", "w") as full:
        messages = Messages(full)
        assert messages.write("x" * 100_000) == 100_000
        messages.flush()
        assert messages.write("more") == 4
        messages.flush()
        assert (messages.isatty(), messages.fileno(), messages.encoding) == (False, full.fileno(), full.encoding)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _full_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
        with open(path, "wb", buffering=0) as device, pytest.raises(OSError, match="No space"):
            device.write(b"1")
    except OSError:
        pytest.skip("no device can be made here")


@pytest.mark.parametrize("made", [_pipe, _full_device])
def test_a_device_or_a_pipe_is_written_to_and_not_replaced(made: Callable[[Path], None], tmp_path: Path) -> None:
    made(tmp_path / "out.json")
    before = (tmp_path / "out.json").stat()
    with pytest.raises(StorageError, match=r"cannot write .*out\.json"):
        save_json(tmp_path / "out.json", "plan", {})
    after = (tmp_path / "out.json").stat()
    assert (after.st_mode, after.st_rdev, after.st_ino) == (before.st_mode, before.st_rdev, before.st_ino)
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_pipe_gets_the_content(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.json")
    reader = os.open(tmp_path / "out.json", os.O_RDONLY | os.O_NONBLOCK)
    try:
        save_json(tmp_path / "out.json", "plan", {"numbers": [1, 2]})
        assert json.loads(os.read(reader, 1 << 16))["numbers"] == [1, 2]
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "out.json").stat().st_mode)


def test_a_model_of_several_files_does_not_replace_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.onnx")
    with pytest.raises(StorageError, match="a device or a pipe"):
        _write(tmp_path / "net.onnx")
    assert stat.S_ISFIFO((tmp_path / "net.onnx").stat().st_mode)
