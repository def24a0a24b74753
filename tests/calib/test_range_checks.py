"""A table that was changed by hand, or damaged, is refused with the tensor, the column and the numbers."""

import json

import polars as pl
import pytest
import torch
from calibcast.calib import ArtifactError, RangeTable, calibrate
from torch import nn


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    program = torch.export.export(nn.Linear(4, 2).eval(), (torch.randn(3, 4),))
    calibrate(program, [torch.randn(3, 4)], progress=False).save(tmp_path / "r.parquet")
    return tmp_path / "r.parquet"


def rewrite(path, column, value, node="linear"):
    """Change one value of one tensor, header and all else as they were."""
    header = pl.read_parquet_metadata(path)["calibcast"]
    frame = pl.read_parquet(path)
    changed = pl.when(pl.col("node") == node).then(pl.lit(value, frame.schema[column])).otherwise(pl.col(column))
    frame.with_columns(changed.alias(column)).write_parquet(path, metadata={"calibcast": header})


def test_what_calibration_writes_is_taken(path):
    table = RangeTable.load(path)
    table.save(path)
    assert RangeTable.load(path).frame.equals(table.frame)


def test_nonfinite_tensors_and_tables_without_histograms_are_taken(tmp_path):
    program = torch.export.export(nn.Identity(), (torch.zeros(3),))
    for data in (torch.tensor([float("nan")] * 3), torch.tensor([float("inf"), 0.0, -1e-42])):
        with pytest.warns(UserWarning, match="NaN or Inf"):
            ranges = calibrate(program, [data], progress=False, histogram=False)
        ranges.save(tmp_path / "r.parquet")
        assert len(RangeTable.load(tmp_path / "r.parquet")) == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("absmax", 0.5, r"tensor linear \(output 0; .*absmax 0.5.*\) has an absmax that is not the larger"),
        ("absmax", None, "has an absmax that is not the larger"),
        ("absmax", float("nan"), "has NaN or Inf as its absmax"),
        ("min", 1e9, "has a min above its max"),
        ("smallest", 1e9, "has a smallest magnitude above its absmax"),
        ("nan", -1, "has a negative nan"),
        ("zeros", 10**9, "counts more than its elements"),
        ("elements", None, "has no elements"),
        ("kind", "weird", "has a kind that is none of input, parameter"),
        ("module", None, "has no module"),
        ("histogram", [1, 2], "has a histogram without 256 bins"),
        ("histogram", [-1] * 256, "has a negative count in its histogram"),
        ("histogram", [10**6] * 256, "counts more in its histogram than its elements"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(path, column, value, message):
    rewrite(path, column, value)
    with pytest.raises(
        ArtifactError, match=rf"r\.parquet: the row of tensor linear .*{message.split(') ')[-1]}"
    ) as caught:
        RangeTable.load(path)
    assert "calibrate again" in str(caught.value)


def test_a_column_changed_for_all_says_how_many(path):
    frame, header = pl.read_parquet(path), pl.read_parquet_metadata(path)["calibcast"]
    frame.with_columns(max=pl.col("max") + 1.0, absmax=pl.col("absmax") * 0.5).write_parquet(
        path, metadata={"calibcast": header}
    )
    with pytest.raises(ArtifactError, match="and so do 3 more"):
        RangeTable.load(path)


@pytest.mark.parametrize("digests", [[1], "text", None, 3])
def test_a_header_without_digests_is_refused(path, digests):
    frame, header = pl.read_parquet(path), json.loads(pl.read_parquet_metadata(path)["calibcast"])
    header["calibration"]["digests"] = digests
    frame.write_parquet(path, metadata={"calibcast": json.dumps(header)})
    with pytest.raises(ArtifactError, match="cannot be read as one"):
        RangeTable.load(path)
