"""What `calibcast init` writes: a job that runs without changes, on data that calibcast ships."""

from __future__ import annotations

import shutil
from pathlib import Path

from calibcast.calib.errors import StorageError
from calibcast.engines.job.errors import JobError

_DIGITS = Path(__file__).parents[1] / "demo_data" / "digits.parquet"

_JOB = """\
# A calibration job: calibcast run job.toml
# Paths are relative to this file. A second run does only what changed; a run that was killed goes on where it was.

[model]
# A .pt2 file, or file.py:function that returns an ExportedProgram or (module, args[, kwargs[, dynamic_shapes]]).
location = "functions.py:model"
# Keyword arguments of the function.
arguments = { hidden = 32 }

[data]
# One of: folder (save_to_disk), parquet, json, csv, images (a folder), hub (a name), loader (file.py:function).
parquet = "digits.parquet"
split = "train"
# streaming = true                 # read as a stream, without a local copy
batch_size = 64
# Which column feeds which input of the model. A list of columns is stacked.
columns = { pixels = "pixels" }
# transform = "functions.py:to_inputs"   # from a batch to the model's inputs, or to what columns picks from
# shuffle = true                   # needs a seed: an unseeded order does not repeat
# seed = 0
# max_batches = 100
held_out_share = 0.2               # of the batches, evenly spread, that calibration does not see

# Other data to verify with, in place of held_out_share; keys that are left out are those of [data].
# [held_out]
# parquet = "held_out.parquet"

[calibration]
# device = "cuda"
checkpoint_batches = 100           # a checkpoint every so many batches, or ..
checkpoint_seconds = 60.0          # .. after so many seconds

[limits]
# What the data may do; beyond it the job stops with exit code 3.
on_nonfinite_inputs = "warn"       # NaN or Inf in a batch: warn, skip or stop
max_bad_share = 0.0                # share of the batches that may raise
# max_growing_share = 0.1          # share of the tensors that may still grow in the last tenth of the data
# max_moved_decisions = 0          # decisions that the last tenth of the data may still change

[plan]
low_precision_type = "fp16"        # or "bf16"
# min_sqnr_db = 40.0               # the budget; default: 40 in fp16, 26 in bf16
# data_max = 512.0                 # a limit of magnitude on top; inf: none
# nodes_to_exclude = ["^head"]     # regexes on node name or module path
# rules = ["functions.py:my_rule"]

[build]
backend = "auto"                   # tensorrt where it supports the GPU, else inductor, else eager

[verification]
# The gate: exit code 3 when a bound does not hold on the held-out data.
min_sqnr_db = 30.0
metrics = { agreement = "functions.py:agreement" }
min_metrics = { agreement = 0.98 }

[output]
folder = "output"                  # or an fsspec URL: s3://bucket/night
"""

_FUNCTIONS = '''\
"""The functions that job.toml names."""

import torch
from torch import nn
from torch.export import Dim


def model(hidden):
    """The fp32 model in eval mode, an example of its inputs, and which of their dimensions vary."""
    torch.manual_seed(0)  # put your trained weights here
    network = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10))
    return Classifier(network).eval(), (torch.zeros(2, 64),), {}, {"pixels": {0: Dim("batch", min=1, max=1024)}}


class Classifier(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels):
        """pixels: [N, 64], 0 to 16. Returns logits [N, 10]."""
        return self.network(pixels)


def agreement(output, reference, batch):
    """Share of the rows of a batch on which the engine and the fp32 model agree. `batch` has the labels, too."""
    return (output.argmax(-1) == reference.argmax(-1)).float().mean().item()
'''


def write_template(folder: Path) -> list[Path]:
    """Write job.toml, functions.py and digits.parquet into `folder`. Returns their paths. Overwrites nothing.

    Raises JobError where one of them exists, ArtifactError where they cannot be written.
    """
    job, functions, data = (folder / name for name in ("job.toml", "functions.py", "digits.parquet"))
    for path in (job, functions, data):
        if path.exists():
            raise JobError(
                f"{path} exists, and calibcast init overwrites nothing. Name another folder: calibcast init FOLDER"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        job.write_text(_JOB, encoding="utf-8")
        functions.write_text(_FUNCTIONS, encoding="utf-8")
        shutil.copyfile(_DIGITS, data)
    except OSError as error:
        raise StorageError(f"cannot write into {folder}: {error}") from error
    return [job, functions, data]
