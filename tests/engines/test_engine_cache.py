"""The cache: whole entries, one builder at a time, bounded, and a key that tells everything apart."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from calibcast.calib import ArtifactError
from calibcast.engines.handover import key_of as key_of_request
from calibcast.engines.runtimes import BuildRequest
from calibcast.engines.tensorrt.builder.job import BuilderJob
from calibcast.engines.tensorrt.cache import EngineCache, cache_key, default_folder
from calibcast.passes import classify, insert_casts
from torch import nn

from tests.unmeasured import calibrate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache", size=10_000)


@pytest.fixture
def built(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "one.engine").write_bytes(b"x" * 1000)
    (folder / "wiring.json").write_text("{}")
    return folder


def found(cache, key, folder):
    with cache.locked(key):
        record = cache.find(key, folder)
    return record, sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def kept(cache, key, folder, **record):
    with cache.locked(key):
        cache.keep(key, folder, record)


def test_what_was_kept_is_found_with_its_record(cache, built, tmp_path):
    assert found(cache, "k", tmp_path / "a") == (None, [])
    kept(cache, "k", built, seconds=2.5)
    assert found(cache, "k", tmp_path / "b") == ({"seconds": 2.5}, ["one.engine", "wiring.json"])


@pytest.mark.parametrize("damage", ["truncated", "removed", "no entry file", "broken entry file"])
def test_a_damaged_entry_is_none_and_is_removed(cache, built, tmp_path, damage):
    kept(cache, "k", built)
    entry = cache.folder / "k"
    if damage == "truncated":
        (entry / "one.engine").write_bytes(b"x" * 999)
    elif damage == "removed":
        (entry / "one.engine").unlink()
    elif damage == "no entry file":
        (entry / "entry.json").unlink()
    else:
        (entry / "entry.json").write_text("{")
    assert found(cache, "k", tmp_path / "a") == (None, [])
    assert not entry.exists()
    kept(cache, "k", built)
    assert found(cache, "k", tmp_path / "b")[0] == {}


def test_the_least_recently_used_goes_when_it_is_too_much(built, tmp_path):
    cache = EngineCache(tmp_path / "cache", size=3_500)  # an entry takes about 1,200 bytes
    for position, key in enumerate("abc"):
        kept(cache, key, built)
        if key in "ab":
            os.utime(cache.folder / key, (1000 + position, 1000 + position))
    assert not (cache.folder / "a").exists()
    found(cache, "b", tmp_path / "used")  # now used later than c was made
    kept(cache, "d", built)
    assert {path.name for path in cache.folder.iterdir() if path.is_dir()} == {"b", "d"}


def test_an_entry_in_use_is_not_removed(built, tmp_path):
    cache = EngineCache(tmp_path / "cache", size=1_000)
    kept(cache, "a", built)
    with cache.locked("a"):
        kept(cache, "b", built)
        assert (cache.folder / "a").exists()
    kept(cache, "c", built)
    assert not (cache.folder / "a").exists()


def test_a_second_builder_waits_and_finds_what_the_first_kept(cache, built, tmp_path):
    order = []

    def second():
        with cache.locked("k"):
            order.append("second")
            assert cache.find("k", tmp_path / "got") is not None

    with cache.locked("k"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
        cache.keep("k", built, {})
    thread.join(timeout=300)
    assert order == ["first", "second"]


def test_processes_that_write_at_once_leave_one_whole_entry(cache, built, tmp_path):
    script = (
        "import sys; from pathlib import Path; from calibcast.engines.tensorrt.cache import EngineCache\n"
        "cache = EngineCache(Path(sys.argv[1]))\n"
        "for _ in range(20):\n"
        "    with cache.locked('k'): cache.keep('k', Path(sys.argv[2]), {'by': sys.argv[3]})\n"
    )
    command = [sys.executable, "-c", script, str(cache.folder), str(built)]
    children = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(2)]
    assert [child.wait(timeout=900) for child in children] == [0, 0]
    record, files = found(cache, "k", tmp_path / "a")
    assert record["by"] in {"0", "1"}
    assert files == ["one.engine", "wiring.json"]
    assert not list(cache.folder.glob(".new-*"))


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"cannot use the engine cache.*CALIBCAST_CACHE"),
        EngineCache(tmp_path / "file" / "cache").locked("k"),
    ):
        pass


def test_the_folder_is_the_users_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("CALIBCAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "calibcast" / "engines"
    monkeypatch.setenv("CALIBCAST_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


class Net(nn.Module):
    def __init__(self, slope=0.1):
        super().__init__()
        self.linear, self.slope = nn.Linear(4, 3), slope

    def forward(self, x):
        return nn.functional.leaky_relu(self.linear(x), self.slope)


def key_of(low_type="float16", seed=0, slope=0.1, settings=None, versions=None, batch=2, **plan_settings):
    torch.manual_seed(seed)
    x = torch.ones(batch, 4)
    program = torch.export.export(Net(slope).eval(), (x,))
    plan = classify(program, calibrate(program, [x], progress=False), low_precision_type=low_type, **plan_settings)
    job = BuilderJob((((batch, 4),) * 3,), settings or {})
    return key_of_request(BuildRequest(insert_casts(program, plan), plan), job, versions or {"tensorrt-rtx": "1.6"})


def test_everything_that_an_engine_depends_on_is_in_the_key():
    """fp16 and bf16 plans of one model differ in dtype arguments alone, which Torch-TensorRT's own key leaves out."""
    keys = {
        "same": key_of(),
        "bf16": key_of("bfloat16"),
        "weights": key_of(seed=1),
        "attribute": key_of(slope=0.2),
        "plan": key_of(nodes_to_exclude=["^leaky"]),
        "settings": key_of(settings={"optimization_level": 5}),
        "set": key_of(settings={"torch_executed_ops": {torch.ops.aten.relu.default, torch.ops.aten.add.Tensor}}),
        "versions": key_of(versions={"tensorrt-rtx": "1.4"}),
        "gpu": key_of(versions={"tensorrt-rtx": "1.6", "gpu": "NVIDIA H200"}),
        "sizes": key_of(batch=3),
    }
    assert len(set(keys.values())) == len(keys)
    assert key_of() == keys["same"]


def test_the_key_is_the_same_in_another_process():
    script = (
        "import sys; sys.path.insert(0, 'tests/engines'); import os; os.environ['CALIBCAST_CACHE'] = '/nowhere'\n"
        "import torch; from test_engine_cache import key_of\n"
        "ops = {torch.ops.aten.relu.default, torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}\n"
        "print(key_of(settings={'torch_executed_ops': ops}))"
    )
    paths = [str(ROOT / ".package"), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, check=True, timeout=900,
        ).stdout.strip()
        for seed in "01"
    }  # fmt: skip
    assert len(told) == 1


def test_a_key_holds_the_order_of_edges():
    assert cache_key({"graph": {"a": "1", "b": "2"}}) != cache_key({"graph": {"a": "2", "b": "1"}})


def mode(path):
    return path.stat().st_mode & 0o777


def test_the_cache_is_its_owners_alone(cache, built):
    cache.folder.mkdir(mode=0o755)
    kept(cache, "k", built)
    assert mode(cache.folder) == mode(cache.folder / "k") == 0o700
    assert mode(cache.folder / "k.lock") == 0o600


def test_a_folder_of_another_user_is_not_used(cache, built, monkeypatch):
    kept(cache, "k", built)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ArtifactError, match=r"belongs to user .*CALIBCAST_CACHE"):
        kept(cache, "k", built)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link"])
def test_an_entry_that_was_tampered_with_is_not_loaded(cache, built, tmp_path, name):
    kept(cache, "k", built)
    (tmp_path / "outside").write_text("secret")
    (cache.folder / "k/link").symlink_to(tmp_path / "outside")
    entry = json.loads((cache.folder / "k/entry.json").read_text())
    entry["files"][name] = hashlib.sha256(b"secret").hexdigest()
    (cache.folder / "k/entry.json").write_text(json.dumps(entry))
    assert found(cache, "k", tmp_path / "a") == (None, [])
    assert (tmp_path / "outside").read_text() == "secret"


def test_trimming_leaves_what_another_process_writes(built, tmp_path, monkeypatch):
    """An entry is written whole, under its lock, while another thread trims: it is there afterwards."""
    cache = EngineCache(tmp_path / "cache", size=1)
    rename = Path.rename

    def slow(path, target):
        if path.name.startswith(".new-a"):
            kept(cache, "b", built)  # trims while `a` is complete but for its name
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slow)
    kept(cache, "a", built)
    assert (cache.folder / "a/entry.json").is_file()


def test_many_threads_and_keys_trim_without_an_error(built, tmp_path, caplog):
    def work(number):
        mine = EngineCache(tmp_path / "cache", size=3_000)
        for turn in range(15):
            kept(mine, f"{number}x{turn}", built)
            found(mine, f"{number}x{turn}", tmp_path / f"got{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "not kept" not in caplog.text
    assert "damaged" not in caplog.text


def test_what_a_killed_process_left_is_removed(cache, built):
    kept(cache, "k", built)
    for name in (".new-dead", ".new-k-1"):
        (cache.folder / name).mkdir()
        (cache.folder / name / "big").write_bytes(b"x" * 100)
    kept(cache, "k", built)
    assert not list(cache.folder.glob(".new-*"))


def test_a_full_disk_loses_no_engine(cache, built, tmp_path, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calibcast.engines.tensorrt.cache.shutil.copytree", full)
    kept(cache, "k", built)
    assert "No space left on device" in caplog.text
    assert found(cache, "k", tmp_path / "a") == (None, [])
