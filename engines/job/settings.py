"""The tables and keys of a job file. The table of keys in the README is made from these models."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

Names = Annotated[tuple[str, ...], Strict(False)]  # TOML has lists only
BOUNDS = frozenset(
    {"min_sqnr_db", "max_rel_l2", "min_cosine", "min_top1", "max_abs", "min_metrics"}
    | {"min_variation_db", "min_channel_db", "min_channel_variation_db", "min_equal"}
)
SOURCES = ("folder", "parquet", "json_lines", "csv", "images", "hub", "loader", "recorded")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @field_validator("*")
    @classmethod
    def _no_nan(cls, value: Any) -> Any:
        """Refuse nan, which TOML allows: as a bound it would reject everything or nothing."""
        every = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(one, float) and math.isnan(one) for one in every):
            raise ValueError("nan is no limit; leave the key out, or give a number")
        return value


class Model(_Table):
    """The fp32 model."""

    location: str = Field(description="`net.pt2`, or `file.py:function` that returns an exported program or "
                          "`(module, args[, kwargs[, dynamic_shapes]])`")  # fmt: skip
    arguments: dict[str, Any] = Field({}, description="keyword arguments of that function")


class Source(_Table):
    """Where batches come from: exactly one of the keys from `folder` to `recorded` is set."""

    folder: str | None = Field(None, description="a folder written by `Dataset.save_to_disk`")
    parquet: str | Names | None = Field(None, description="Parquet files: paths or globs")
    json_lines: str | Names | None = Field(None, alias="json", description="JSON or JSON Lines files: paths or globs")
    csv: str | Names | None = Field(None, description="CSV files: paths or globs")
    images: str | None = Field(None, description="a folder of images, as `imagefolder` of datasets reads it")
    hub: str | None = Field(None, description="the name of a dataset on the hub, or a local folder with one")
    loader: str | None = Field(None, description="`file.py:function` that returns a DataLoader or any iterable of "
                               "batches; it may take `rank` and `world_size`, and then gives that shard")  # fmt: skip
    recorded: str | None = Field(None, description="a folder of calls that `calibcast.recorded` wrote")
    arguments: dict[str, Any] = Field({}, description="keyword arguments of `loader`")
    config: str | None = Field(None, description="configuration of a `hub` dataset")
    revision: str | None = Field(None, description="revision of a `hub` dataset")
    split: str = Field("train", description="which split of the dataset")
    streaming: bool = Field(False, description="read as a stream, without a local copy")
    columns: dict[str, str | Names] = Field({}, description="model input -> column, or a list of columns to stack; "
                                            "default: the columns named like inputs")  # fmt: skip
    transform: str | None = Field(None, description="`file.py:function` from a batch to the model's inputs, or to "
                                  "what `columns` picks from")  # fmt: skip
    batch_size: int = Field(32, ge=1, description="rows per batch; a `loader` has its own")
    workers: int = Field(0, ge=0, description="processes that load; a `loader` has its own, a stream none")
    shuffle: bool = Field(False, description="shuffle the rows; needs `seed`")
    seed: int | None = Field(None, description="of the shuffle")
    watch: str | Names = Field((), description="more files that the data come from: when one changes, the data are new")

    @property
    def kind(self) -> str:
        """Which of the sources is set."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        named = [name for name in SOURCES if getattr(self, name) is not None]
        shown = ", ".join("json" if name == "json_lines" else name for name in SOURCES)
        if len(named) != 1:
            raise ValueError(
                f"set exactly one of {shown}; {'none is' if not named else ' and '.join(named) + ' are'} set"
            )
        if self.shuffle and self.seed is None:
            raise ValueError("shuffle = true needs seed = a number: an unseeded order does not repeat, so a run that "
                             "was killed could not go on")  # fmt: skip
        if self.loader is not None and self.shuffle:
            raise ValueError("shuffle is for datasets: let the function of loader shuffle, with a seeded generator")
        if self.arguments and self.loader is None:
            raise ValueError("arguments are those of loader, which is not set")
        for name in ("config", "revision"):
            if getattr(self, name) is not None and self.hub is None:
                raise ValueError(f"{name} is that of hub, which is not set")
        for name, column in self.columns.items():
            if not column:
                raise ValueError(f"columns: nothing feeds the input {name}: name a column, or a list of them")
        return self


class Data(Source):
    """The data to calibrate on, and how much of them is held out to verify with."""

    max_batches: int | None = Field(None, ge=1, description="calibrate on at most so many batches")
    held_out_share: float = Field(0.2, ge=0, lt=1, description="share of the batches, evenly spread, that calibration "
                                  "does not see; without effect where [held_out] is given")  # fmt: skip


class CalibrationTable(_Table):
    """How ranges are measured."""

    histogram: bool = Field(True, description="count fp32 exponents too: `range_quantile` and `storage` need them")
    device: str | None = Field(None, description="where to run: cpu, cuda, cuda:1; default: where the model is; cuda "
                               "under torchrun is each process's own")  # fmt: skip
    on_nonfinite: Literal["warn", "skip", "stop"] = Field(
        "warn", description="NaN or Inf inside the model: record it, leave the batch out, or stop"
    )
    rounding_batches: int = Field(
        4,
        ge=0,
        description="also measure on so many batches, over all processes, what rounding does to the outputs; 0: not",
    )
    carry_state: bool = Field(
        False,
        description="run the batches one after another as the sequences that they are: each goes on from what the one "
        "before left in the buffers that the model writes to, until a batch is a `NewSequence`; verification too",
    )
    checkpoint_batches: int = Field(100, ge=1, description="write a checkpoint every so many batches")
    checkpoint_seconds: float = Field(60.0, gt=0, description="or after so many seconds, whichever comes first")


class Limits(_Table):
    """What the data may do before the job stops with exit code 3."""

    on_nonfinite_inputs: Literal["warn", "skip", "stop"] = Field(
        "warn", description="NaN or Inf in a batch's inputs: count it, leave the batch out too, or stop"
    )
    max_bad_share: float = Field(0.0, ge=0, le=1, description="share of the batches that may raise; they are left out")
    max_growing_share: float | None = Field(
        None, ge=0, le=1, description="share of the tensors whose peak may still grow in the last tenth of the data"
    )
    max_moved_decisions: int | None = Field(
        None, ge=0, description="how many decisions the last tenth of the data may still change"
    )


class Plan(_Table):
    """Rules and thresholds: the arguments of `classify`."""

    low_precision_type: Literal["fp16", "bf16"] = Field("fp16", description="the low type")
    min_sqnr_db: float | None = Field(None, gt=0, description="the budget: least SQNR of each output "
                                      "channel, dB; default: 40 in fp16, 26 in bf16")  # fmt: skip
    prove_batches: int = Field(8, ge=0, description="run the plan on so many calibration batches, and mend it until it "
                               "meets the budget; 0: do not")  # fmt: skip
    data_max: float | None = Field(None, gt=0, description="largest magnitude of inputs and activations; inf: none; "
                                   "default: 512, none where rounding was measured")  # fmt: skip
    init_max: float | None = Field(None, gt=0, description="largest magnitude of weights; default: the type's largest")
    max_depth_of_reduction: int | None = Field(None, ge=1, description="most terms summed into one element")
    nodes_to_exclude: Names = Field((), description="regexes on node name or module path: these stay high")
    targets_to_exclude: Names = Field((), description="operators that stay high, such as `aten.add.Tensor`")
    nodes_to_include: Names = Field((), description="regexes: low whatever the rules say")
    targets_to_include: Names = Field((), description="operators: low whatever the rules say")
    range_quantile: float = Field(1.0, gt=0, le=1, description="judge `data_max` by this share of the magnitudes")
    wide_accumulation: Names = Field((), description="operators that the backend sums up in fp32 whatever their type, "
                                     "such as `layer_norm`")  # fmt: skip
    rescale: Literal["off", "auto"] = Field(
        "off", description="auto: store tensors as powers of two of themselves where more then runs in the low type"
    )
    rules: Names = Field((), description="your own: `file.py:function` from NodeFacts to a Verdict or None")


class Build(_Table):
    """The engine."""

    backend: Literal["auto", "tensorrt", "inductor", "eager"] = Field(
        "auto", description="auto: TensorRT where the flavour supports the GPU, else Inductor, else eager"
    )
    ahead_of_time: bool = Field(False, description="build where there is no GPU; verification then judges the cast "
                                "program in PyTorch")  # fmt: skip
    strict_precision: bool = Field(False, description="a gate: the engine's own types must be those of the plan")
    allow_unknown: bool = Field(False, description="for that gate: nodes may be missing in what the engine tells")
    on_failure: Literal["error", "fallback"] = Field("error", description="fallback: apply known remedies, and say so")
    build_timeout: float | None = Field(1800.0, gt=0, description="seconds after which the builder counts as hung")
    keep_io_types: bool = Field(True, description="inputs and outputs keep the model's types")
    settings: dict[str, Any] = Field({}, description="of the backend, by its own names")


class Verification(_Table):
    """The gate: bounds on held-out data; exit code 3 when one does not hold."""

    max_batches: int | None = Field(None, ge=1, description="verify on at most so many held-out batches")
    metrics: dict[str, str] = Field({}, description="name -> `file.py:function` of (output, reference[, batch]), a "
                                    "number per batch")  # fmt: skip
    min_sqnr_db: float | None = Field(None, description="least SQNR of each output, dB")
    max_rel_l2: float | None = Field(None, description="largest relative L2 error of each output")
    min_cosine: float | None = Field(None, description="least cosine of each output with the reference")
    min_top1: float | None = Field(None, description="least share of rows whose largest element is the reference's")
    max_abs: float | None = Field(None, description="largest absolute error of each output")
    min_variation_db: float | None = Field(None, description="least SQNR against the variation of each output, each "
                                           "channel about its own mean, dB")  # fmt: skip
    min_channel_db: float | None = Field(None, description="least SQNR of any channel of any output, dB")
    min_channel_variation_db: float | None = Field(None, description="the same, against the channel's variation")
    min_equal: float | None = Field(None, description="least share of equal elements of integer and boolean outputs")
    min_metrics: dict[str, float] = Field({}, description="least value of your metrics, by name")

    @model_validator(mode="after")
    def _known_metrics(self) -> Verification:
        for name in self.min_metrics:
            if name not in self.metrics:
                there = ", ".join(self.metrics) or "none"
                raise ValueError(f"min_metrics.{name} is the bound of a metric that is not in metrics (there: {there})")
        return self

    @property
    def bounds(self) -> dict[str, Any]:
        """The arguments of `VerificationReport.require`."""
        return {name: value for name, value in self if name in BOUNDS and value not in (None, {})}


class Output(_Table):
    """Where the artifacts go."""

    folder: str = Field("calibcast-output", description="a folder, or an fsspec URL such as `s3://bucket/night`")
    scratch: str | None = Field(None, description="local folder to work in when `folder` is a URL; default: "
                                "`.calibcast/` beside the job file")  # fmt: skip


class Job(_Table):
    """A job file: one table for each part."""

    model: Model
    data: Data
    held_out: Source | None = Field(None, description="other data to verify with; keys left out are those of [data]")
    calibration: CalibrationTable = CalibrationTable()
    limits: Limits = Limits()
    plan: Plan = Plan()
    build: Build = Build()
    verification: Verification = Verification()
    output: Output = Output()

    @model_validator(mode="after")
    def _gate_has_data(self) -> Job:
        if self.verification.bounds and self.held_out is None and self.data.held_out_share == 0:
            raise ValueError("[verification] has bounds, but nothing is held out: set [data] held_out_share above 0, "
                             "or give [held_out]")  # fmt: skip
        if self.calibration.carry_state:
            _refuse_torn_sequences(self.data, self.held_out)
        if self.plan.range_quantile < 1 and not self.calibration.histogram:
            raise ValueError("[plan] range_quantile below 1 needs histograms: set [calibration] histogram = true")
        return self


def _refuse_torn_sequences(data: Data, held_out: Source | None) -> None:
    """Raise ValueError for data whose batches would not come in their original order."""
    if held_out is None and data.held_out_share > 0:
        raise ValueError("[calibration] carry_state = true, but [data] held_out_share takes batches out of the middle "
                         "of sequences: give [held_out], or set held_out_share = 0")  # fmt: skip
    if data.shuffle or (held_out is not None and held_out.shuffle):
        raise ValueError("[calibration] carry_state = true, but shuffle = true tears sequences apart: shuffle whole "
                         "sequences in a loader of your own")  # fmt: skip
