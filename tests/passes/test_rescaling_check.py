"""Both programs are run where there is data, and noise is heard where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibcast.calib.calibration import calibrate
from calibcast.calib.errors import BatchError
from calibcast.calib.operators.exponents import EQUATIONS
from calibcast.calib.range_diff import range_diff
from calibcast.calib.ranges import RangeTable
from calibcast.calib.rounding_table import ROUNDING_KEY
from calibcast.passes.cast_insertion import insert_casts
from calibcast.passes.classification import classify
from calibcast.passes.rescaling.rescaling import rescale
from calibcast.passes.tuning import tune
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.rescaling_networks import CASES
from tests.passes.rescaling_models import Growing, growing, measured, rising, sqnr


class TwoLoud(nn.Module):
    """Two branches of large values, through SiLU and through ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            for linear in (self.one, self.two):
                linear.weight.mul_(1e5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = F.silu(self.one(x)), torch.relu(self.two(x))
        return self.last(F.layer_norm(one, (16,)) + F.layer_norm(two, (16,)))


def batches(count: int = 3) -> list[tuple[torch.Tensor]]:
    return [(torch.randn(4, 16, generator=torch.Generator().manual_seed(i)),) for i in range(count)]


def test_data_show_what_a_wrong_row_of_the_table_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """SiLU is not homogeneous. Said to be, it is rescaled; run on data, the part is left as it is, by name."""
    data = batches()
    program = torch.export.export(TwoLoud().eval(), data[0])
    ranges = measured(program, data)
    monkeypatch.setitem(EQUATIONS, "silu", "out = self")
    blind = rescale(program, ranges)
    assert not torch.equal(blind.program.module()(*data[0]), program.module()(*data[0]))
    seen = rescale(program, ranges, dataloader=data)
    assert torch.equal(seen.program.module()(*data[0]), program.module()(*data[0]))
    assert [refusal.node for refusal in seen.refused] == ["silu"]
    assert "run on batch 0, its fp32 result is not that of the original" in str(seen)
    assert seen.changed  # the rest of it is still a gain


def test_right_rows_pass_the_run() -> None:
    program, data = growing()
    ranges = measured(program, data)
    with_data, without = rescale(program, ranges, dataloader=data), rescale(program, ranges)
    assert with_data.exponents == without.exponents
    assert not with_data.refused
    with pytest.raises(BatchError):
        rescale(program, ranges, dataloader=[torch.zeros(4, 31)])


class Frozen(nn.Module):
    """All of it under `torch.no_grad`, as many a wrapper for inference has it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Growing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = self.inner(x)
        return found + 1


def test_what_runs_under_no_grad_is_rescaled_too(tmp_path: Path) -> None:
    """The region goes, as it means nothing in inference; true values are those of the network, by its own names."""
    _, data = growing()
    program = torch.export.export(Frozen().eval(), data[0])
    ranges = calibrate(program, data, rounding_batches=1, progress=False)
    assert any("." in name for name in ranges.frame["node"])
    fitted = rescale(program, ranges, dataloader=data)
    assert fitted.changed
    assert fitted.after is not None
    assert fitted.after.work_low == 1.0
    assert torch.equal(fitted.program.module()(*data[0]), program.module()(*data[0]))
    again = calibrate(fitted.program, data, rounding_batches=1, progress=False)
    assert fitted.ranges.frame.equals(again.frame)
    assert fitted.ranges.hidden.equals(again.hidden)
    assert fitted.ranges.rounding.select(ROUNDING_KEY).equals(again.rounding.select(ROUNDING_KEY))
    assert fitted.ranges.calibration.digests == again.calibration.digests
    assert fitted.ranges.true_values() == replace(ranges, rounding=ranges.rounding.clear())
    fitted.ranges.save(tmp_path / "r.parquet")
    torch.export.save(fitted.program, tmp_path / "m.pt2")
    loaded = RangeTable.load(tmp_path / "r.parquet")
    assert loaded == fitted.ranges
    loaded.check(torch.export.load(tmp_path / "m.pt2"), "refuse")
    assert range_diff(ranges, loaded).counts["same"] == len(ranges)
    plan = tune(fitted.program, loaded, data)
    mixed = insert_casts(fitted.program, plan)
    assert sqnr(program.module()(*data[0]), mixed.module()(*data[0])) > 45.0


def test_what_runs_under_no_grad_and_fits_stays_as_it_is() -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return torch.relu(x) * 2

    data = batches()
    program = torch.export.export(Small(), data[0])
    ranges = measured(program, data)
    kept = rescale(program, ranges)
    assert kept.program is program
    assert kept.ranges is ranges


class Faint(nn.Module):
    """A norm that sees values of any size: of those that no calibration saw, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(1e6)
            self.first.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.layer_norm(torch.relu(self.first(x)), (16,), eps=1e-30))


def test_data_far_from_calibration_show_that_exactness_ends() -> None:
    """Where results go below 2^-126 at the smaller scale, bits are lost: the table could not know."""
    data = batches()
    program = torch.export.export(Faint().eval(), data[0])
    ranges = measured(program, data)
    assert rescale(program, ranges).changed
    faint = [(data[0][0] * 1e-42,)]
    kept = rescale(program, ranges, dataloader=faint)
    assert torch.equal(kept.program.module()(*faint[0]), program.module()(*faint[0]))
    assert kept.refused


def test_a_quiet_proposal_is_taken_before_one_that_rounds_louder() -> None:
    """What a decoder's sum began as is not stored where fp16 has few digits left: over 55 dB, of 58 unscaled."""
    case = CASES["latent decoder"]
    program = case.program()
    ranges = measured(program, [case.batch(i) for i in range(2)])
    fitted = rescale(program, ranges)
    assert fitted.after is not None
    assert fitted.after.work_low > 0.999
    assert fitted.after.quiet
    (x,) = case.batch(7)
    mixed = insert_casts(fitted.program, classify(fitted.program, fitted.ranges))
    assert sqnr(program.module()(x), mixed.module()(x)) > 55.0


def test_the_command_runs_both_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`calibcast rescale --data`: a wrong loader is told, a right one passes."""
    from calibcast.engines import cli

    program, data = rising()
    torch.export.save(program, tmp_path / "m.pt2")
    measured(program, data).save(tmp_path / "r.parquet")
    (tmp_path / "loaders.py").write_text(
        "import torch\n\ndef right():\n    return [torch.randn(4, 32)]\n\n"
        "def wrong():\n    return [torch.randn(4, 31)]\n"
    )
    codes = []
    for name in ("right", "wrong"):
        line = ["rescale", tmp_path / "m.pt2", tmp_path / "r.parquet", "-o", tmp_path / "f.pt2"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, line), "--data", f"{tmp_path}/loaders.py:{name}"])
        codes.append(int(ended.value.code or 0))
    assert codes == [0, 1]
    assert "31" in capsys.readouterr().err
