"""The demo tells the truth: fp32 works, whole fp16 does not, the plan does."""

import datasets
import torch
from calibcast.engines.demo import CLASSES, DATA, load_digits, run_demo
from sklearn.datasets import load_digits as sklearn_digits


def test_the_shipped_digits_are_scikit_learns(tmp_path):
    rows = datasets.Dataset.from_parquet(str(DATA), cache_dir=str(tmp_path)).with_format("numpy")
    theirs = sklearn_digits()
    assert len(rows) == 1797
    assert (rows["pixels"][:] == theirs.data).all()
    assert (rows["label"][:] == theirs.target).all()


def test_the_three_parts_are_disjoint_and_complete():
    parts = load_digits()
    assert [len(part) for part in parts] == [997, 200, 600]
    images = torch.cat([pixels for part in parts for pixels, _ in part])
    theirs = torch.tensor(sklearn_digits().data) * 255 / 16
    assert torch.equal(images.float().sort(0).values, theirs.float().sort(0).values)
    assert images.max() == 255.0


def test_the_three_way_outcome(tmp_path):
    """fp32 is good, everything in fp16 is NaN or near chance, and the plan is within 0.2 points of fp32."""
    said = []
    outcome = run_demo(tmp_path / "demo", said.append)
    assert outcome.fp32 > 0.9
    assert outcome.half <= 2 / CLASSES
    assert outcome.half_nonfinite > 0.5
    assert abs(outcome.mixed - outcome.fp32) <= 0.002 + 1e-9
    assert outcome.report.passed
    rules = {verdict.rule for d in outcome.plan.decisions for verdict in d.verdicts}
    assert {"headroom", "rounding"} <= rules
    assert len(outcome.plan.low_precision_nodes) > len(outcome.plan.high_precision_nodes) > 0
    text = "\n".join(said)
    for name in outcome.plan.high_precision_nodes:
        assert outcome.plan[name].reason[:40] in text  # a table is cut at the width of the terminal
    assert f"{100 * outcome.mixed:.2f}%" in text
    last = text.splitlines()[-2:]  # in two lines, to be pasted
    assert last[0].startswith("   calibcast report ")
    assert last[0].endswith(" \\")
    assert last[1].startswith("      --plan ")
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"program.pt2", "ranges.parquet", "plan.json", "engine", "verification.csv"}
