"""Inductor's packages on a GPU: run with `python -m pytest -m gpu` where CUDA is. Each in a process of its own, as a
package that crashes takes its process along."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
_MODEL = """
import torch
from calibcast import Engine, build, calibrate, insert_casts, tune

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))
batches = [torch.randn(8, 64) for _ in range(4)]
program = torch.export.export(net.eval(), (batches[0],))
ranges = calibrate(program, batches, progress=False)
plan = tune(program, ranges, batches)
engine = build(insert_casts(program, plan), plan, ranges, backend="inductor", progress=False, batches=batches,
               reference=program)
engine.save("engine")
again = Engine.load("engine")
with torch.no_grad():
    wanted = net(batches[0])
for found in (engine(batches[0]), again(batches[0])):
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, atol=5e-3, rtol=5e-3)
print("right")
"""


def run(command, folder):
    flags = ["-X", "faulthandler"]
    return subprocess.run([sys.executable, *flags, *command], capture_output=True, text=True, cwd=folder, timeout=400)


def test_a_package_is_built_run_saved_and_loaded(tmp_path):
    done = run(["-c", _MODEL], tmp_path)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["right"]), done.stderr[-3000:]


def test_a_job_ends_with_an_engine(tmp_path):
    assert run(["-m", "calibcast", "init", "night"], tmp_path).returncode == 0
    job = tmp_path / "night" / "job.toml"
    job.write_text(job.read_text().replace('backend = "auto"', 'backend = "inductor"'))
    done = run(["-m", "calibcast", "run", str(job)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((job.parent / "output" / "manifest.json").read_text())
    assert manifest["status"] == "done"
