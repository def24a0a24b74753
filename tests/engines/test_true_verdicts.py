"""No verdict says "passed" of something that did not pass, whatever a caller, an engine or a file does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate
from calibcast.calib.errors import ArtifactError, CalibcastError, MismatchError, SettingError
from calibcast.engines import build, verify
from calibcast.engines.cli import _run
from calibcast.engines.judging.bounds import Bounds
from calibcast.engines.judging.report import VerificationReport
from calibcast.engines.judging.report_file import load_report, read_verdict, save_report
from calibcast.passes import classify
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tests.functions import exported

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def _judged(
    engine: Callable[..., Any], program: ExportedProgram, *batches: Tensor, **bounds: Any
) -> VerificationReport:
    return verify(engine, program, list(batches or (X,)), progress=False, bounds=bounds)


@pytest.mark.parametrize(
    "bound",
    [
        {"min_sqnr_db": math.nan},
        {"min_sqnr_db": -400},
        {"min_sqnr_db": -math.inf},
        {"min_sqnr_db": "40"},
        {"min_sqnr_db": True},
        {"min_sqnr_db": [40]},
        {"max_abs": math.inf},
        {"max_rel_l2": -1},
        {"min_cosine": 2},
        {"min_cosine": -2},
        {"min_top1": -1},
        {"min_equal": 1.5},
        {"min_metrics": 3},
        {"min_metrics": {"accuracy": math.nan}},
        {"min_metrics": {"accuracy": "high"}},
    ],
    ids=str,
)
def test_a_bound_that_says_nothing_is_refused(bound: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(bound))):
        _judged(lambda x: x * -5, exported(lambda x: x * 2, X), **bound)


def test_bounds_at_their_ends_are_bounds() -> None:
    ends = {"min_sqnr_db": 0, "max_abs": 0.0, "min_cosine": -1, "min_top1": 1, "min_equal": 0, "max_rel_l2": 5}
    assert Bounds.of({**ends, "min_metrics": {"loss": -3.5}, "min_channel_db": None}).set() == {
        **ends,
        "min_metrics": {"loss": -3.5},
    }


def test_outputs_of_other_names_are_another_model() -> None:
    program = exported(lambda x: {"scores": x * 2, "boxes": x + 1}, X)
    with pytest.raises(MismatchError, match="calls its outputs a, b, the program scores, boxes"):
        _judged(lambda x: {"a": x * 2, "b": x + 1}, program)
    assert _judged(lambda x: {"boxes": x + 1, "scores": x * 2}, program, min_sqnr_db=40).passed
    assert _judged(lambda x: (x * 2, x + 1), program, min_sqnr_db=40).passed
    assert not _judged(lambda x: (x + 1, x * 2), program, min_sqnr_db=40).passed


def test_nested_outputs_are_known_by_their_names_and_places() -> None:
    program = exported(lambda x: {"layers": [x, x * 2], "last": {"state": x + 1}}, X)
    given = {"last": {"state": X + 1}, "layers": [X, X * 2]}
    assert _judged(lambda _: given, program, min_sqnr_db=40).passed
    with pytest.raises(MismatchError, match=r"layers\.0, layers\.1, hidden"):
        _judged(lambda _: {"layers": [X, X * 2], "hidden": X + 1}, program)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda x: (x * 2, x, 3, 2.5), r"output[1]: a tensor [8, 6] in batch 0, where the program gives None"),
        (lambda x: (x * 2, None, 4, 2.5), "output[2]: 4 in batch 0, where the program gives 3"),
        (lambda x: (x * 2, None, 3, 3.5), "output[3]: 3.5 in batch 0, where the program gives 2.5"),
    ],
)
def test_outputs_that_are_no_tensors_must_be_equal(given: Callable[[Tensor], Any], words: str) -> None:
    program = exported(lambda x: (x * 2, None, 3, 2.5), X)
    assert _judged(lambda x: (x * 2, None, torch.tensor(3), 2.5001), program, min_sqnr_db=40).passed
    report = _judged(given, program, min_sqnr_db=40)
    assert not report.passed
    assert words in str(report.verdict)
    assert not _judged(given, program).passed


@pytest.mark.parametrize(
    ("engine", "model"),
    [(lambda x: x.to(torch.complex64), lambda x: x * 1), (lambda x: x, lambda x: torch.fft.fft(x))],
    ids=["complex for real", "real for complex"],
)
def test_complex_and_real_outputs_are_not_compared(engine: Callable[[Tensor], Tensor], model: Any) -> None:
    with pytest.raises(MismatchError, match="complex64"):
        _judged(engine, exported(model, X), min_sqnr_db=40)


def test_booleans_in_the_place_of_scores_fail() -> None:
    assert not _judged(lambda x: x > 0, exported(lambda x: x * 2, X), min_sqnr_db=40).passed


def test_a_complex_reference_of_nan_judges_nothing() -> None:
    program = exported(lambda x: torch.complex(x.log(), x), X)
    with pytest.warns(UserWarning, match="reference itself is not finite: first in batch 0 at node log"):
        report = _judged(lambda x: torch.complex(x.log(), x), program, min_sqnr_db=40)
    assert not report.passed


def test_an_engine_that_writes_into_its_inputs_is_found_out() -> None:
    def engine(x: Tensor) -> Tensor:
        return x.add_(100).view(-1)

    batch = X.clone()
    assert not _judged(engine, exported(lambda x: x.view(-1), X), batch, min_sqnr_db=40).passed
    assert torch.equal(batch, X)


def test_wrong_integers_beside_right_scores_are_told() -> None:
    program = exported(lambda x: (x * 2, x.argmax(-1)), X)
    report = _judged(lambda x: (x * 2, torch.full((8,), 9)), program, min_sqnr_db=40)
    assert str(report.verdict) == ("passed 40 dB with inf; not judged: output[1] (0% equal, min_equal was not set)")
    assert not _judged(lambda x: (x * 2, torch.full((8,), 9)), program, min_sqnr_db=40, min_equal=0.9).passed
    right = _judged(lambda x: (x * 2, x.argmax(-1)), program, min_sqnr_db=40)
    assert str(right.verdict) == "passed 40 dB with inf"
    scores = _judged(lambda x: (x * 3, x.argmax(-1)), program, min_equal=1.0)
    assert str(scores.verdict) == "passed 1 equal with 1; not judged: output[0] (6.0 dB)"


def test_batches_without_samples_have_no_metric() -> None:
    sizes = {0: Dim("rows", min=0, max=64)}
    program = torch.export.export(nn.Linear(6, 2), (X,), dynamic_shapes=(sizes,))
    report = verify(
        program.module(), program, [X[:0]], progress=False, metrics={"kept": lambda *_: 1.0},
        bounds={"min_metrics": {"kept": 0.5}},
    )  # fmt: skip
    assert math.isnan(report.metrics["kept"])
    assert not report.passed


def test_what_cannot_be_called_is_no_engine() -> None:
    with pytest.raises(CalibcastError, match=r"engine is a str\. Give an Engine"):
        verify("engine", exported(lambda x: x * 2, X), [X], progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["outputs"][0].update(sqnr_db=3.0),
        lambda content: content.update(problems=["output: 3 NaN or Inf"]),
        lambda content: content["bounds"].update(min_sqnr_db=400),
        lambda content: content["bounds"].update(min_sqnr_db="any"),
        lambda content: content.update(outputs=[]),
    ],
    ids=["numbers", "problems", "bounds", "no bound", "no outputs"],
)
def test_a_file_whose_numbers_say_no_has_not_passed(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    save_report(path, _judged(lambda x: x * 2.001, exported(lambda x: x * 2, X), min_sqnr_db=40))
    assert load_report(path).passed
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    for read in (read_verdict, load_report):
        with pytest.raises(ArtifactError, match=r"says that it passed, but|cannot be judged"):
            read(path)


def test_the_words_of_a_verdict_are_those_of_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    save_report(path, _judged(lambda x: x * 3, exported(lambda x: x * 2, X)))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "verdict": "passed 400 dB with 500.0"}))
    assert read_verdict(path)["verdict"] == "no bounds were set"


def test_an_alarm_over_little_in_common_cannot_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = nn.Linear(6, 6)
    for name, rest in (("a", [nn.Tanh(), nn.ReLU(), nn.SiLU()]), ("b", [nn.GELU(), nn.Hardtanh(), nn.ELU()])):
        program = torch.export.export(nn.Sequential(shared, *rest).eval(), (X,))
        ranges = calibrate(program, [X], progress=False, rounding_batches=0)
        ranges.save(f"{name}.parquet")
        classify(program, ranges).save(f"{name}.json")
    for kind in ("parquet", "json"):
        assert _run(["diff", f"a.{kind}", f"b.{kind}", "--fail-on", "flip"]) == 3
        assert "the two files have only 1 of 4" in capsys.readouterr().err
        assert _run(["diff", f"a.{kind}", f"b.{kind}"]) == 0
    assert pl.read_parquet("a.parquet").height


def test_a_bound_on_the_command_line_is_looked_at_before_torch_is_imported(tmp_path: Path) -> None:
    program = exported(lambda x: x * 2, X)
    build(program, None, backend="eager").save(tmp_path / "engine")
    (tmp_path / "user.py").write_text("def model(): ...\ndef data(): ...\n")
    code = "import sys; from calibcast.engines.cli import _run; print(_run(sys.argv[1:]), 'torch' in sys.modules)"
    line = ["verify", "engine", "user.py:model", "--data", "user.py:data", "--min-sqnr-db", "-5"]
    ran = subprocess.run([sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "False"]
    assert ran.stderr.startswith("error: --min-sqnr-db: -5.0 is no bound")
