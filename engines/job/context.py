"""What all stages of a job use: its file and folder, the model, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from calibcast.calib.artifacts import versions
from calibcast.calib.batches import Signature, signature_of
from calibcast.calib.graph_digests import fingerprint
from calibcast.calib.program_digests import node_digests, weights_hash
from calibcast.engines.job.folder import (
    JobFolder,
    Store,
)
from calibcast.engines.job.inputs import Inputs, inputs_of
from calibcast.engines.job.job_file import JobFile
from calibcast.engines.job.openers import OpenedData, open_data
from calibcast.engines.job.ranks import Ranks
from calibcast.engines.job.settings import Source
from calibcast.engines.job.shares import Share
from calibcast.engines.job.signals import Signals
from calibcast.engines.locations import load_function, load_model
from torch.export import ExportedProgram


@dataclass(frozen=True)
class JobContext:
    """One run of a job in this process, as its stages see it."""

    file: JobFile
    folder: JobFolder
    ranks: Ranks
    signals: Signals
    bar: bool = True
    store: Store | None = None

    @cached_property
    def program(self) -> ExportedProgram:
        """The model, exported."""
        model = self.file.job.model
        return load_model(self.file.function(model.location), model.arguments)

    @cached_property
    def signature(self) -> Signature:
        return signature_of(self.program)

    @cached_property
    def model_inputs(self) -> dict[str, str]:
        """Fingerprints of the model and of calibcast, on which every stage depends."""
        graph = fingerprint(node_digests(self.program))
        return {"program": graph, "weights": weights_hash(self.program), "calibcast": versions()["calibcast"]}

    @cached_property
    def calibration_share(self) -> Share:
        """This process's calibration batches."""
        job = self.file.job
        held = 0.0 if job.held_out is not None else job.data.held_out_share
        return Share(held, False, job.data.max_batches, self.ranks.rank, self.ranks.world)

    @cached_property
    def held_out(self) -> tuple[Source, Share] | None:
        """Where the held-out batches are; None when nothing is held out."""
        job = self.file.job
        most = job.verification.max_batches
        if job.held_out is not None:
            return job.held_out, Share(most=most)
        return (job.data, Share(job.data.held_out_share, True, most)) if job.data.held_out_share > 0 else None

    def opened(self, source: Source, ranks: Ranks) -> tuple[OpenedData, Inputs]:
        """The data that a table of the job file names, and how its batches become inputs."""
        found = open_data(self.file, source, ranks.rank, ranks.world)
        transform = None if source.transform is None else load_function(self.file.function(source.transform))
        return found, inputs_of(source, self.signature, found.columns, transform)
