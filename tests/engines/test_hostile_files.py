"""Files that lie about their size, their types, or what they are: refused with a short message, at once, unopened."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, RangeTable, calibrate
from calibcast.calib.artifacts import save_program
from calibcast.calib.call_files import load_call, save_call
from calibcast.calib.checkpoint import Checkpoint
from calibcast.calib.json_types import require_types
from calibcast.calib.parquet_size import declared, declared_too_much
from calibcast.calib.seal import UNSEALED, sealed
from calibcast.engines import Engine, build
from calibcast.engines.cli import _run
from calibcast.engines.engine import read_ledger, read_manifest
from calibcast.engines.judging.report_file import load_report, read_verdict, save_report
from calibcast.engines.judging.verification import verify
from calibcast.engines.runtime import read_io, read_tensors
from calibcast.passes import PrecisionPlan, classify, insert_casts
from safetensors.torch import save_file
from torch import nn


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, a plan, an engine and a verdict, as calibcast writes them."""
    here = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    ranges = calibrate(program, [torch.randn(2, 4)], progress=False)
    plan = classify(program, ranges)
    engine = build(insert_casts(program, plan), plan, ranges, backend="eager")
    ranges.save(here / "r.parquet")
    plan.save(here / "p.json")
    save_program(program, here / "m.pt2")
    engine.save(here / "engine")
    save_report(here / "v.json", verify(engine, program, [torch.randn(2, 4)], progress=False))
    return here


def table(good: Path, target: Path, frame: pl.DataFrame | None = None, **calibration: Any) -> Path:
    """A table whose frame or header was changed, with the checksum of what it is now."""
    metadata = {k: v for k, v in pl.read_parquet_metadata(good / "r.parquet").items() if k != "ARROW:schema"}
    header = json.loads(metadata["calibcast"])
    header["calibration"] |= calibration
    stream = io.BytesIO()
    whole = pl.read_parquet(good / "r.parquet") if frame is None else frame
    whole.write_parquet(stream, metadata={**metadata, "calibcast": json.dumps(header), **UNSEALED})
    target.write_bytes(sealed(stream.getvalue()))
    return target


def test_a_small_table_of_many_rows_or_bins_is_not_unpacked(good: Path, tmp_path: Path) -> None:
    frame = pl.read_parquet(good / "r.parquet")
    alike = {c: pl.lit(frame[c][0], dtype=frame.schema[c]) for c in frame.columns if c not in ("histogram", "shape")}
    rows = pl.select(pl.repeat(0, 2_000_000).alias("histogram")).with_columns(**alike)
    bins = frame.head(1).with_columns(pl.Series("histogram", [pl.repeat(0, 20_000_000, eager=True).cast(pl.Int64)]))
    for lying in (rows, bins):
        file = table(good, tmp_path / "lying.parquet", lying)
        assert file.stat().st_size < 1_000_000
        tracemalloc.start()
        with pytest.raises(ArtifactError, match=r"it declares \d+ bytes of values, and has \d+"):
            RangeTable.load(file)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


def test_tables_as_they_are_written_are_far_from_the_bound(good: Path) -> None:
    frame = pl.read_parquet(good / "r.parquet")
    large = pl.concat([frame.with_columns(node=pl.format("n{}_{}", pl.lit(i), pl.col("node"))) for i in range(4000)])
    stream = io.BytesIO()
    large.write_parquet(stream)
    assert large.height >= 16_000
    assert declared_too_much(stream.getvalue()) is None
    assert declared_too_much((good / "r.parquet").read_bytes()) is None


def test_footers_are_read_as_pyarrow_reads_them(good: Path) -> None:
    import pyarrow.parquet as parquet

    lists = [[i, None] for i in range(1000)]
    frame = pl.DataFrame({"a": range(1000), "b": lists, "c": ["x", None] * 500, "d": [True] * 1000})
    stream = io.BytesIO()
    frame.write_parquet(stream, row_group_size=300, metadata={"k": "v"})
    for content in (
        (good / "r.parquet").read_bytes(),
        stream.getvalue(),
        (good / "engine/ledger.parquet").read_bytes(),
    ):
        footer = parquet.read_metadata(io.BytesIO(content))
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
        assert declared(content) == [(chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]
    for damage in (b"\xff" * 40, b"\x19" * 40, b"\x1c" * 9000, b"\x00", b"\x49\x1c\x00"):
        with (
            pytest.raises(ValueError, match="its footer is damaged") if damage != b"\x00" else contextlib.nullcontext()
        ):
            declared(b"PAR1" + damage + struct.pack("<I", len(damage)) + b"PAR1")


CALIBRATION = {
    "batches": ["9", -1, 10**400, float("nan"), True, None],
    "skipped": [[{"a": 1}], [-1], 7],
    "input_sizes": [7, {"x": 7}, {"x": [{"4": "many"}]}, {"x": [[{}]]}],
    "input_hashes": [[{}], "abc"],
    "digests": [[1], {"linear": 5}],
    "weights": [5, None],
    "versions": [[1], {"torch": 2}],
    "ends_only": ["no", 1],
}


@pytest.mark.parametrize("field", CALIBRATION)
def test_the_record_of_a_calibration_has_its_types(good: Path, tmp_path: Path, field: str) -> None:
    for value in CALIBRATION[field]:
        file = table(good, tmp_path / "r.parquet", **{field: value})
        with pytest.raises(ArtifactError, match="claims to be a ranges file, but cannot be read as one"):
            RangeTable.load(file)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("absmax_batch", -1, "has a negative absmax_batch"),
        ("nonfinite_batch", -5, "has a negative nonfinite_batch"),
        ("hidden_max", float("-inf"), "has a negative hidden_max, or NaN"),
        ("hidden_min", float("nan"), "has a negative hidden_min, or NaN"),
        ("module", "m" * 20_000, "has a module of more than 16384 bytes"),
    ],
)
def test_values_that_no_calibration_writes(good: Path, tmp_path: Path, column: str, value: Any, told: str) -> None:
    frame = pl.read_parquet(good / "r.parquet")
    changed = frame.with_columns(pl.lit(value, dtype=frame.schema[column]).alias(column))
    with pytest.raises(ArtifactError, match=told):
        RangeTable.load(table(good, tmp_path / "r.parquet", changed))


def changed_json(source: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    document = json.loads(source.read_text())
    change(document)
    target.write_text(json.dumps(document))
    return target


PLAN: dict[str, Any] = {
    "low_precision_type": [7, None, {}],
    "settings": [7, "x", [1]],
    "notes": ["read letter by letter", [[]], {"a": 1}],
    "masks": ["x", [[]], 7],
    "flips": [[1], {"float16": 3}, {"float16": {"linear": "x"}}],
    "budgets": [7, {"float16": {"linear": []}}],
    "rounding": [7, {"min_sqnr_db": "x", "predicted_sqnr_db": 1, "edges": []}],
    "proof": [[], {"outputs": 7}],
    "exponents": [{"linear": "x"}, {"linear": 10**400}, [1]],
    "digests": [[1], {"linear": 7}],
    "decisions": [7, [7], [{"node": 7}]],
}


@pytest.mark.parametrize("field", PLAN)
def test_a_plan_has_its_types(good: Path, tmp_path: Path, field: str) -> None:
    for value in PLAN[field]:
        file = changed_json(good / "p.json", tmp_path / "p.json", lambda plan, v=value: plan.update({field: v}))
        with pytest.raises(ArtifactError, match="claims to be a plan file, but cannot be read as one"):
            PrecisionPlan.load(file)


@pytest.mark.parametrize(
    "field", ["node", "op", "module", "precision", "rule", "reason", "evidence", "verdicts", "work"]
)
def test_a_decision_has_its_types(good: Path, tmp_path: Path, field: str) -> None:
    for value in ({"a": []}, [[]]):
        file = changed_json(
            good / "p.json", tmp_path / "p.json", lambda plan, v=value: plan["decisions"][0].update({field: v})
        )
        with pytest.raises(ArtifactError, match="claims to be a plan file, but cannot be read as one"):
            PrecisionPlan.load(file)


def engine_with(good: Path, target: Path, change: Callable[[Any], Any], **files: bytes) -> Path:
    """A copy of the engine with other files, sealed again, and then a changed manifest."""
    import shutil

    shutil.copytree(good / "engine", target)
    for name, content in files.items():
        (target / f"{name}.parquet").write_bytes(content)
    reseal = {f"{name}.parquet": hashlib.sha256(content).hexdigest() for name, content in files.items()}
    changed_json(
        good / "engine/manifest.json", target / "manifest.json", lambda m: (m["files"].update(reseal), change(m))
    )
    return target


MANIFEST: dict[str, list[Any]] = {
    "backend": [7, {}], "why": [7, []], "settings": [7, {"a": []}], "built_with": ["x", {"torch": 7}],
    "build": [7, {"remedies": 7}, {"fallback_to_pytorch": [1]}, {"cache": "x"}], "size_names": [7, {"s0": 7}],
    "fingerprint": [7, None], "weights": [{}, None], "plan": [7, []], "ranges": [True, {}],
    "files": [7, {"program.pt2": 7}],
}  # fmt: skip


@pytest.mark.parametrize("field", MANIFEST)
def test_an_engines_manifest_has_its_types(good: Path, tmp_path: Path, field: str) -> None:
    for number, value in enumerate(MANIFEST[field]):
        folder = engine_with(good, tmp_path / f"{number}", lambda m, v=value: m.update({field: v}))
        for read in (read_manifest, Engine.load):
            with pytest.raises(ArtifactError, match="cannot be read as one"):
                read(folder)
        assert _run(["inspect", str(folder)]) == 2


def test_a_ledger_has_its_columns(good: Path, tmp_path: Path) -> None:
    ledger = read_ledger(good / "engine")
    for number, (frame, told) in enumerate((
        (pl.DataFrame({"a": [1]}), "column node is missing"),
        (ledger.with_columns(layers=pl.lit("x")), "column layers is String"),
        (ledger.with_columns(planned=pl.lit(None, dtype=pl.String)), "column planned has a gap"),
    )):  # fmt: skip
        stream = io.BytesIO()
        frame.write_parquet(stream, metadata=UNSEALED)
        folder = engine_with(good, tmp_path / f"{number}", lambda m: None, ledger=sealed(stream.getvalue()))
        with pytest.raises(ArtifactError, match=rf"not a readable ledger .*: {told}"):
            read_ledger(folder)


@pytest.mark.parametrize("name", ["plan.json", "program.pt2", "ledger.parquet", "manifest.json"])
def test_a_pipe_in_an_engines_folder_is_not_waited_for(good: Path, tmp_path: Path, name: str) -> None:
    folder = engine_with(good, tmp_path / "engine", lambda m: None)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ArtifactError):
        Engine.load(folder)
    assert _run(["inspect", str(folder)]) in (0, 2)  # inspect reads no program


VERDICT: dict[str, list[Any]] = {
    "passed": ["yes", 1, []], "verdict": [7, {}], "batches": ["1", 10**400], "problems": [5, [5]], "metrics": [[]],
    "reference_problem": [{}], "floating": [3], "outputs": [{"a": 1}, [7]], "attribution": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("field", VERDICT)
def test_a_verdict_has_its_types(good: Path, tmp_path: Path, field: str) -> None:
    for value in VERDICT[field]:
        file = changed_json(good / "v.json", tmp_path / "v.json", lambda v, new=value: v.update({field: new}))
        for read in (load_report, read_verdict):
            with pytest.raises(ArtifactError, match="claims to be a verification file"):
                read(file)
    (tmp_path / "empty.json").write_text('{"calibcast": "verification", "schema": 1}')
    page = ["--html", str(tmp_path / "h.html"), "--verification", str(tmp_path / "empty.json")]
    assert _run(["report", str(good / "r.parquet"), *page]) == 2


@dataclasses.dataclass
class Row:
    name: str
    sizes: tuple[int, ...]
    share: float | None = None


def test_types_are_told_by_their_place() -> None:
    require_types(
        {"rows": [{"name": "a", "sizes": [1], "share": 1}], "any": {"x": [{}]}}, {"rows": list[Row], "any": Any}
    )
    for rows, place in (
        ([{"name": 1}], r"rows\[0\]\.name is a int, and a str"),
        ([{"sizes": [1, 2.5]}], r"rows\[0\]\.sizes\[1\] is a float, and a int"),
        ([{"sizes": [True]}], r"rows\[0\]\.sizes\[0\] is a bool"),
        ([{"share": 1 << 70}], r"rows\[0\]\.share is a number of more than 64 bits"),
        ([{"share": "x"}], r"rows\[0\]\.share is a str, and a float"),
        ({}, "rows is a dict, and a list"),
    ):
        with pytest.raises(ValueError, match=place):
            require_types({"rows": rows}, {"rows": list[Row]})


def safetensors(header: Any, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "header",
    [
        [1], 7, {"a": 7}, {"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}, b"[" * 100_000,
        {f"t{i}": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for i in range(100_000)},
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 64]}},
        {"a": {"dtype": [], "shape": [16], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": {"x": 1}, "data_offsets": [0, 64]}},
    ],
)  # fmt: skip
def test_a_header_of_tensors_that_lies_is_refused_by_the_plain_reader(tmp_path: Path, header: Any) -> None:
    (tmp_path / "state.safetensors").write_bytes(safetensors(header))
    with pytest.raises(ArtifactError, match="is not a readable file of tensors"):
        read_tensors(tmp_path / "state.safetensors")


IO = {"schema": 1, "kind": "calibcast engine", "engine": "model.engine", "inputs": [], "outputs": [], "state": [],
      "library": "tensorrt", "versions": {}}  # fmt: skip


@pytest.mark.parametrize("engine", ["..", "", "/etc/passwd", "a/b", "../x", 7, None, ["x"]])
def test_an_engine_outside_of_its_folder_is_not_read(tmp_path: Path, engine: Any) -> None:
    (tmp_path / "io.json").write_text(json.dumps({**IO, "engine": engine}))
    with pytest.raises(ArtifactError, match=r"io\.json"):
        read_io(tmp_path)
    (tmp_path / "io.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="is not what calibcast export --engine writes"):
        read_io(tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        {"tuple": [{"tensor": "0"}] * 2}, {"tuple": [7]}, {"device": "nowhere"}, {"dtype": "save"}, {"tensor": []},
        {"tuple": {"a": 1}}, {"exec": "x"}, [], {"a": 1, "b": 2},
    ],
)  # fmt: skip
def test_a_recorded_call_that_was_changed_is_refused(tmp_path: Path, call: Any) -> None:
    save_call(tmp_path / "good", True, (torch.ones(2),), {})
    assert load_call(tmp_path / "good")[0] is True
    told = {"tuple": [{"tuple": [call]}, {"dict": {}}]} if isinstance(call, dict) else call
    text = json.dumps({"version": 1, "begins": True, "call": told})
    save_file({"0": torch.ones(2)}, tmp_path / "bad", metadata={"calibcast.call": text})
    with pytest.raises(ArtifactError, match="is not a readable recorded call"):
        load_call(tmp_path / "bad")


def test_a_checkpoints_header_has_its_types(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))

    def loader() -> Any:
        yield torch.randn(2, 4)
        raise KeyboardInterrupt

    path = tmp_path / "c.npz"
    with pytest.raises(KeyboardInterrupt):
        calibrate(program, loader(), progress=False, checkpoint=path, checkpoint_batches=1)
    found = Checkpoint.load(path)
    for change in ({"made_of": [1]}, {"notes": 7}, {"last": 7}, {"position": "1"}, {"early": {"x": 1}}):
        import numpy as np

        arrays = dict(np.load(io.BytesIO(found.to_bytes())))
        header = json.loads(arrays.pop("header").tobytes()) | change
        stream = io.BytesIO()
        np.savez(stream, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
        with pytest.raises(ArtifactError, match="claims to be a checkpoint file"):
            Checkpoint.from_bytes(stream.getvalue(), path)


def test_a_plan_of_many_nodes_is_read_in_seconds(good: Path, tmp_path: Path) -> None:
    def many(plan: Any) -> None:
        plan["decisions"] = [{**plan["decisions"][0], "node": f"n{i}"} for i in range(20_000)]
        plan["digests"] = {f"n{i}": "x" for i in range(20_000)}

    file, start = changed_json(good / "p.json", tmp_path / "p.json", many), time.process_time()
    assert len(PrecisionPlan.load(file).decisions) == 20_000
    assert time.process_time() - start < 10
