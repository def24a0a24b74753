"""A builder process is kept for the next build, and never when it might be of harm."""

import os
import subprocess
import sys
import time

import pytest
import torch
from calibcast.calib import BuildError
from calibcast.engines import build
from calibcast.engines.tensorrt.builder import isolation, worker
from torch import nn

from benchmarks.rtx_builder import has_builder

pytestmark = pytest.mark.skipif(not has_builder(), reason="needs torch-tensorrt-rtx 2.14")


@pytest.fixture(autouse=True)
def _no_worker_before_or_after():
    worker.clear()
    yield
    worker.clear()


def kept():
    return worker._SHELF._kept


def ahead(size=4, **options):
    program = torch.export.export(nn.Linear(size, 3).eval(), (torch.ones(2, size),))
    return build(program, backend="tensorrt", ahead_of_time=True, cache=False, progress=False, **options)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_builder_is_kept_for_the_next_build_and_is_none_the_worse_for_it():
    isolation.prepare_builder()
    first = kept().process.pid
    ahead()
    assert kept().process.pid == first, "the one that was prepared"
    engine = ahead(5)
    assert kept().process.pid == first
    assert engine.record["stage_seconds"]["building the engine"] > 0
    # What makes it build badly ends it.
    with pytest.raises(BuildError, match="no setting 'nonsense'"):
        ahead(nonsense=1)
    assert kept() is None
    assert not alive(first)
    os.environ["CALIBCAST_TEST_OF_KEYS"] = "1"
    try:
        ahead()
        second = kept().process.pid
    finally:
        del os.environ["CALIBCAST_TEST_OF_KEYS"]
    isolation.prepare_builder()
    assert kept().process.pid != second, "other surroundings"
    assert not alive(second)


def test_a_builder_that_is_not_asked_ends_by_itself(monkeypatch):
    isolation.prepare_builder()
    process = kept().process
    kept().since = time.monotonic() - worker.IDLE
    process.stdin.close()  # as when this process ends
    assert process.wait(30) == 0
    isolation.prepare_builder()
    assert kept().process.pid != process.pid


def test_a_builder_imports_torch_tensorrt_only_when_it_is_told():
    """Its import takes seconds, and changes how torch compiles; so a builder for Inductor does without."""
    search = isolation.module_search_path(isolation._ROOT)
    command = [sys.executable, "-X", "importtime", "-P", "-m", worker.PROCESS]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search}
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "torch" in imported
    assert not {name for name in imported if name.startswith(("torch_tensorrt", "tensorrt"))}

    plain = worker.take(search, (), plain=True)
    assert not plain.ready
    worker.keep(plain)
    assert worker.take(search, (), plain=True) is plain
    worker.keep(plain)
    other = worker.take(search, ())
    try:
        assert other is not plain, "it has been promised to jobs without Torch-TensorRT"
        assert not alive(plain.process.pid)
        assert other.ready
    finally:
        other.end()


def test_a_builder_that_has_done_nothing_yet_takes_on_what_changed_meanwhile(tmp_path, monkeypatch):
    """Between the start of a builder and its first job the user's own code runs: it imports, and sets variables."""
    isolation.prepare_builder()
    first = kept().process.pid
    (tmp_path / "module_of_the_user.py").write_text(
        "import torch\n"
        "@torch.library.custom_op('of_the_user::twice', mutates_args=())\n"
        "def twice(x: torch.Tensor) -> torch.Tensor:\n    return 2 * x\n"
        "@twice.register_fake\n"
        "def _(x):\n    return torch.empty_like(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CALIBCAST_TEST_OF_SURROUNDINGS", "1")
    monkeypatch.chdir(tmp_path)
    import module_of_the_user

    class Net(nn.Module):
        def forward(self, x):
            return module_of_the_user.twice(x).relu() + x

    program = torch.export.export(Net().eval(), (torch.ones(2, 4),))
    engine = build(program, backend="tensorrt", ahead_of_time=True, cache=False, progress=False)
    assert "twice" in engine.record["fallback_to_pytorch"]
    assert kept().process.pid == first
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ahead()
    assert kept().process.pid != first, "CUDA may have started there with other devices"


FORKED = """
import os, signal, sys
from calibcast.engines.tensorrt.builder import worker

worker.fork_early(ready=True)
first = worker.kept().process
assert type(first).__name__ == "Forked", first
assert "torch" in sys.modules and "torch_tensorrt" not in sys.modules

import torch
from calibcast.engines import build

def ahead(size):
    program = torch.export.export(torch.nn.Linear(size, 3).eval(), (torch.ones(2, size),))
    return build(program, backend="tensorrt", ahead_of_time=True, cache=False, progress=False)

assert ahead(4).record["stage_seconds"]["building the engine"] > 0
assert worker.kept().process is first
assert os.getsid(first.pid) != os.getsid(0), "what is meant for the command does not reach its builder"
ahead(5)
assert worker.kept().process is first
os.kill(first.pid, signal.SIGKILL)
assert first.wait() == -signal.SIGKILL == first.poll()
ahead(6)
second = worker.kept().process
assert second is not first
worker.fork_early(ready=True)  # torch is imported now: too late
assert worker.kept().process is second
print("all", "right", first.pid, second.pid)
"""


def test_a_command_forks_its_builder_before_it_does_anything_else():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[:2] == ["all", "right"]
    assert not alive(int(said[2]))
    assert not alive(int(said[3])), "a builder ends with the process that started it"


CLOSED = """
import os, sys
for stream in (0, 1, 2):
    os.close(stream)
sys.stdin = sys.stdout = sys.stderr = None
from calibcast.engines.tensorrt.builder import worker
worker.fork_early(ready=False)
process = worker.kept().process
process.stdin.close()
os._exit(40 + process.wait())
"""
CUDA = """
from calibcast.engines.tensorrt.builder import forking, worker
seen = forking._open_files
forking._open_files = lambda: {**seen(), 9: "/dev/nvidiactl"}
worker.fork_early(ready=False)
assert worker.kept() is None
"""


@pytest.mark.parametrize(("script", "code"), [(CLOSED, 40), (CUDA, 0)])
def test_a_fork_needs_no_streams_and_does_not_follow_cuda(script, code):
    """Streams may be closed, as a service's are. CUDA that has started does not survive a fork."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr


JOB = """
[model]
location = "net.py:model"
[data]
loader = "net.py:loader"
held_out_share = 0.0
[build]
backend = "tensorrt"
ahead_of_time = true
settings = { cache = false }
"""
NET = """
import os, torch
def model():
    assert os.getpid() == int(os.environ["OWNER"]), "the model is loaded by the job alone"
    return torch.nn.Linear(4, 3).eval(), (torch.ones(2, 4),)
def loader():
    return [torch.ones(2, 4)] * 2
"""
RUN = """
import os, sys
from calibcast.engines.tensorrt.builder import worker
os.environ["OWNER"] = str(os.getpid())
kinds = []
take = worker.take
def taken(*arguments, **options):
    found = take(*arguments, **options)
    kinds.append(type(found.process).__name__)
    return found
worker.take = taken
from calibcast.engines.cli import main
try:
    main(["run", sys.argv[1]])
finally:
    print(kinds)
"""


def test_a_job_builds_in_the_builder_that_it_forked(tmp_path):
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "net.py").write_text(NET)
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path / "job.toml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['Forked']"
    assert "manifest    done" in done.stdout


REPLACED = """
import sys
from pathlib import Path
from calibcast.engines.tensorrt.builder import worker
worker.fork_early(ready=False)
assert type(worker.kept().process).__name__ == "Forked"
import torch
from calibcast.engines.tensorrt.builder.isolation import BuilderError, build_isolated
from calibcast.engines.tensorrt.builder.job import INDUCTOR, BuilderJob
begun, started = [], worker.started
worker.started = lambda path: begun.append(path) or started(path)
program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
job = BuilderJob((((1, 2),) * 3,), {}, device="cuda", compiler=INDUCTOR)
try:
    build_isolated(job, program, Path(sys.argv[1]), timeout=300, progress=False)
except BuilderError as error:
    print(error.kind)
print(len(begun))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked builder reaches the GPU that is here")
def test_a_forked_builder_that_cannot_use_the_gpu_is_replaced(tmp_path):
    """CUDA that something has started does not survive a fork: the job goes to a builder with a Python of its own."""
    done = subprocess.run([sys.executable, "-c", REPLACED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
