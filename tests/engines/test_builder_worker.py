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


def test_a_builder_for_inductor_imports_no_torch_tensorrt():
    """Its import takes seconds, and changes how torch compiles; so the two kinds are not taken for each other."""
    search = isolation.module_search_path(isolation._ROOT)
    command = [sys.executable, "-X", "importtime", "-P", "-m", worker.PROCESS, worker.PLAIN]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search}
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "torch" in imported
    assert not {name for name in imported if name.startswith(("torch_tensorrt", "tensorrt"))}

    plain = worker.take(search, (), plain=True)
    worker.keep(plain)
    assert worker.take(search, (), plain=True) is plain
    worker.keep(plain)
    other = worker.take(search, ())
    try:
        assert other is not plain
        assert not alive(plain.process.pid)
    finally:
        other.end()
