"""A calibration that is killed goes on from its checkpoint, and cannot be told from one that was not."""

from __future__ import annotations

import dataclasses
import io
import random
import tracemalloc
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibcast.calib import ArtifactError, BatchError, MismatchError, RangeTable, calibrate
from calibcast.calib.calibration_run import measure_weights, prepare
from calibcast.calib.checkpoint import Checkpoint, Pace, copy_into, merge_checkpoints
from calibcast.calib.statistics import Statistics
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 12


def network(seed: int = 0) -> ExportedProgram:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    return torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes=({0: Dim("batch", max=64)},))


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return network()


def batches(count: int = BATCHES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2 + i % 3, 4, generator=generator) * (1 + i % 5) for i in range(count)]


class Killed(BaseException):
    """What `kill -9` is to a process, but for the checkpoint file nothing survives it."""


def dies_at(batch: int) -> Iterator[torch.Tensor]:
    for index, value in enumerate(batches()):
        if index == batch:
            raise Killed
        yield value


def assert_same(first: RangeTable, second: RangeTable) -> None:
    assert first.frame.equals(second.frame, null_equal=True)
    assert first.calibration == second.calibration


@pytest.mark.parametrize("death", range(1, BATCHES))
def test_resumed_equals_uninterrupted_bit_for_bit(program: ExportedProgram, tmp_path: Path, death: int) -> None:
    whole = calibrate(program, batches(), progress=False)
    path = tmp_path / "c.npz"
    with pytest.raises(Killed):
        calibrate(program, dies_at(death), progress=False, checkpoint=path, checkpoint_batches=3)
    assert path.exists() is (death >= 3)
    ran: list[int] = []

    def transform(batch: torch.Tensor) -> torch.Tensor:
        ran.append(1)
        return batch

    resumed = calibrate(program, batches(), transform, progress=False, checkpoint=path, checkpoint_batches=3)
    assert_same(resumed, whole)
    assert len(ran) == BATCHES - 3 * (death // 3)  # only what came after the last checkpoint
    assert not path.exists()


def test_a_checkpoint_is_the_same_after_saving_and_loading(program: ExportedProgram, tmp_path: Path) -> None:
    run = prepare(program, None, True, "warn")
    measure_weights(run)
    for index, batch in enumerate(batches(5)):
        run.measure(index, [batch])
        if index == 2:
            early = {3: run.observer.total.to("cpu", copy=True)}
    saved = run.checkpoint(5, {"data": "abc"}, "hash", early=early, notes={"seen": [1, 2]})
    saved.save(tmp_path / "c.npz")
    loaded = Checkpoint.load(tmp_path / "c.npz")
    for item in dataclasses.fields(Checkpoint):
        if item.name not in {"statistics", "early"}:
            assert getattr(loaded, item.name) == getattr(saved, item.name)
    for mine, theirs in ((saved.statistics, loaded.statistics), (early[3], loaded.early[3])):
        for item in dataclasses.fields(Statistics):
            assert torch.equal(getattr(mine, item.name), getattr(theirs, item.name))
    assert loaded.early[3].batches.max() == 3
    assert_same(loaded.table(), run.table())


def test_a_checkpoint_without_histograms_has_none(program: ExportedProgram, tmp_path: Path) -> None:
    run = prepare(program, None, False, "warn")
    run.measure(0, [batches()[0]])
    run.checkpoint(1, {}).save(tmp_path / "c.npz")
    assert Checkpoint.load(tmp_path / "c.npz").statistics.histograms is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty", "pickled"])
def test_a_damaged_checkpoint_is_refused(program: ExportedProgram, tmp_path: Path, damage: str) -> None:
    run = prepare(program, None, True, "warn")
    run.measure(0, [batches()[0]])
    path = tmp_path / "c.npz"
    content = run.checkpoint(1, {}).to_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "foreign": b"PAR1 is no archive",
            "empty": b"",
            "pickled": b"\x80\x04K\x01.",
        }[damage]
    )
    with pytest.raises(ArtifactError, match=r"c\.npz"):
        Checkpoint.load(path)


def test_damaged_checkpoints_never_raise_anything_else(program: ExportedProgram) -> None:
    """Whatever bytes are wrong, reading is an ArtifactError, or they were none of the content."""
    run = prepare(program, None, True, "warn")
    run.measure(0, [batches()[0]])
    whole, generator = run.checkpoint(1, {}).to_bytes(), random.Random(3)
    refused = 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 1, 4])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        try:
            assert Checkpoint.from_bytes(bytes(content), Path("c.npz")).to_bytes() == whole
        except ArtifactError:
            refused += 1
    assert refused > 1300


def test_a_damaged_shape_in_a_checkpoint_is_refused(program: ExportedProgram) -> None:
    """A smaller shape would be read without ever meeting the end, where the checksum is looked at."""
    run = prepare(program, None, True, "warn")
    run.measure(0, [batches()[0]])
    whole = run.checkpoint(1, {}).to_bytes()
    for shape, smaller in ((b", 256)", b", 255)"), (b", 5), }", b", 4), }")):
        assert shape in whole
        with pytest.raises(ArtifactError, match=r"c\.npz is not a readable checkpoint .*CRC of total\."):
            Checkpoint.from_bytes(whole.replace(shape, smaller), Path("c.npz"))


def test_a_checkpoint_of_another_version_of_the_statistics_is_refused(program: ExportedProgram, tmp_path: Path) -> None:
    run = prepare(program, None, True, "warn")
    saved = run.checkpoint(0, {})
    content = saved.to_bytes().replace(b"total.nonfinite_batch", b"total.nonfinite_botch")
    with pytest.raises(ArtifactError, match="nonfinite_botch"):
        Checkpoint.from_bytes(content, tmp_path / "c.npz")


def test_weights_or_settings_that_changed_are_refused(program: ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(Killed):
        calibrate(program, dies_at(5), progress=False, checkpoint=path, checkpoint_batches=1)
    with pytest.raises(MismatchError, match="other weights"):
        calibrate(network(seed=1), batches(), progress=False, checkpoint=path)
    with pytest.raises(MismatchError, match=r"histogram changed since the checkpoint .* delete"):
        calibrate(program, batches(), histogram=False, progress=False, checkpoint=path)


def test_a_transform_may_change_its_batch_in_place(program: ExportedProgram, tmp_path: Path) -> None:
    """What the loader gave is what must be the same again, not what the transform left of it."""
    path = tmp_path / "c.npz"

    def in_place(batch: dict[str, Any]) -> torch.Tensor:
        batch.pop("label")
        return batch["x"].mul_(2.0)

    def labelled(values: Iterable[torch.Tensor]) -> Iterator[dict[str, Any]]:
        return ({"x": value, "label": number} for number, value in enumerate(values))

    whole = calibrate(program, labelled(batches()), in_place, progress=False)
    with pytest.raises(Killed):
        calibrate(program, labelled(dies_at(5)), in_place, progress=False, checkpoint=path, checkpoint_batches=1)
    assert_same(calibrate(program, labelled(batches()), in_place, progress=False, checkpoint=path), whole)


def test_data_or_order_that_changed_is_refused(program: ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(Killed):
        calibrate(program, dies_at(5), progress=False, checkpoint=path, checkpoint_batches=1)
    shuffled = batches()
    random.Random(0).shuffle(shuffled)
    with pytest.raises(BatchError, match="batch 4 is not the one"):
        calibrate(program, shuffled, progress=False, checkpoint=path)
    with pytest.raises(BatchError, match="ended after 2 batches, but 5 were finished"):
        calibrate(program, batches(2), progress=False, checkpoint=path)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(40.0).reshape(10, 4)), batch_size=2, **options)


def test_an_unseeded_shuffle_is_refused_and_a_seeded_one_repeats(program: ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "c.npz"

    def pick(batch: list[torch.Tensor]) -> torch.Tensor:
        return batch[0]

    with pytest.raises(BatchError, match="shuffles \\(RandomSampler\\) without a seed"):
        calibrate(program, loader(shuffle=True), pick, progress=False, checkpoint=path)
    seeded = loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    first = calibrate(program, seeded, pick, progress=False, checkpoint=path)
    assert_same(calibrate(program, seeded, pick, progress=False, checkpoint=path), first)


def test_shards_merge_to_the_whole(program: ExportedProgram) -> None:
    whole = prepare(program, None, True, "warn")
    measure_weights(whole)
    shards = [prepare(program, None, True, "warn") for _ in range(4)]
    for shard in shards:
        measure_weights(shard)
    for index, batch in enumerate(batches(7)):
        whole.measure(index, [batch])
        shards[index % 3].measure(index, [batch])  # uneven, and the fourth gets nothing
    merged = merge_checkpoints([shard.checkpoint(shard.batches, {}) for shard in shards])
    ours, theirs = merged.statistics, whole.observer.total
    for item in dataclasses.fields(Statistics):
        mine, other = getattr(ours, item.name), getattr(theirs, item.name)
        if item.name == "values":
            assert torch.equal(mine[:, :3], other[:, :3])
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)
        else:
            assert torch.equal(mine, other), item.name
    assert merged.position == 7
    assert merged.calibration.batches == 7


def test_of_equal_peaks_in_two_shards_the_earlier_batch_counts(program: ExportedProgram) -> None:
    """As in one process: whichever shard is merged first."""
    shards = [prepare(program, None, True, "warn") for _ in range(2)]
    for index, peak in enumerate((1.0, 5.0, -5.0, 5.0)):
        shards[index % 2].measure(index, [torch.full((2, 4), peak)])
    parts = [shard.checkpoint(2, {}) for shard in shards]
    for order in (parts, parts[::-1]):
        frame = merge_checkpoints(order).table().frame
        assert frame.filter(frame["kind"] == "input")["absmax_batch"].item() == 1


def test_merging_changes_no_shard_and_refuses_another_run(program: ExportedProgram) -> None:
    run = prepare(program, None, True, "warn")
    run.measure(0, [batches()[0]])
    one = run.checkpoint(1, {"data": "a"})
    before = one.statistics
    merge_checkpoints([one, one])
    assert torch.equal(before.counts, one.statistics.counts)
    with pytest.raises(MismatchError, match="data is not the same"):
        merge_checkpoints([one, dataclasses.replace(one, made_of={"data": "b"})])
    other = prepare(network(1), None, True, "warn").checkpoint(0, {"data": "a"})
    with pytest.raises(MismatchError, match="weights"):
        merge_checkpoints([one, other])


def test_copying_into_statistics_is_exact_and_apart() -> None:
    source, target = Statistics.empty(3, True), Statistics.empty(3, True)
    source.values[0, 3] = 0.1
    copy_into(target, source)
    source.values[0, 3] = 0.2
    assert target.values[0, 3] == 0.1


def test_the_pace_counts_batches_and_seconds() -> None:
    by_count = Pace(3, 1e9)
    assert [by_count.tick() for _ in range(3)] == [False, False, True]
    by_count.reset()
    assert by_count.tick() is False
    assert Pace(10**9, 0.0).tick() is True


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _header_of(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _archive({"total.values.npy": _header_of((1 << 26,)) + b"\0" * (1 << 26)}, zipfile.ZIP_DEFLATED),
        _archive({"total.values.npy": _header_of((1 << 44,)) + b"\0" * 64}),
        _archive({"total.values.npy": _header_of((8,), "|O") + b"\x80\x04N." * 16}),
        _archive({"header.txt": b"{}"}),
    ],
    ids=["compressed", "declared shape", "pickled objects", "another file"],
)
def test_no_more_memory_is_taken_than_the_file_has_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bomb.npz").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=r"bomb\.npz is not a readable checkpoint"):
            Checkpoint.load(tmp_path / "bomb.npz")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_arrays_have_a_row_for_each_tensor(program: ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        calibrate(program, dies_at(3), progress=False, checkpoint=tmp_path / "c.npz", checkpoint_batches=2)
    found = Checkpoint.load(tmp_path / "c.npz")
    (tmp_path / "c.npz").write_bytes(dataclasses.replace(found, specs=found.specs[:-1]).to_bytes())
    with pytest.raises(ArtifactError, match="tensors"):
        Checkpoint.load(tmp_path / "c.npz")
