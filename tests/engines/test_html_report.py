"""The HTML report without a browser: what it holds, what it weighs, and that names stay text."""

import dataclasses
import re
from datetime import date
from functools import partial

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate as measure
from calibcast.calib.number_text import percent
from calibcast.engines.cli import _run
from calibcast.engines.html_report import html_report
from calibcast.engines.html_report.payload import packed, payload, relative_sources, unpacked
from calibcast.passes import classify
from calibcast.passes.flips import low_at
from torch import nn

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        a, b = (self.first(x) * 900.0).split(4, -1)
        return self.last(torch.cat([a, b], -1) / 900.0)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(4, 8),))
    ranges = calibrate(program, [torch.randn(4, 8) for _ in range(3)], progress=False)
    return program, ranges, classify(program, ranges)


def content_of(page):
    return unpacked(re.search(r'id="payload">([^<]*)<', page).group(1))


def test_every_tensor_and_every_node_is_in_the_page(made):
    _, ranges, plan = made
    content = content_of(html_report(ranges, plan))
    tensors, nodes = content["tensors"], content["nodes"]
    assert list(zip(tensors["node"], tensors["output"], strict=True)) == ranges.frame.select("node", "output").rows()
    assert nodes["name"] == [d.node for d in plan.decisions]
    assert nodes["reason"] == [d.reason for d in plan.decisions]
    for row, bins in zip(ranges.frame.iter_rows(named=True), tensors["bins"], strict=True):
        first, counts = bins[0] + 127, bins[1:]
        assert list(row["histogram"][first : first + len(counts)]) == counts
        assert sum(counts) == sum(row["histogram"][1:255])


def test_the_page_compares_exactly_what_the_plan_holds(made):
    _, ranges, plan = made
    nodes = content_of(html_report(ranges, plan))["nodes"]
    for name in ("float16", "bfloat16"):
        flips = {n: f for n, f in zip(nodes["name"], nodes[name], strict=True) if n in plan.flips[name]}
        assert flips == plan.flips[name]
    assert low_at(plan.flips["float16"], 512.0) == list(plan.low_precision_nodes)


def test_the_band_leaves_out_a_thousandth_at_either_end():
    counts = [0] * 256
    counts[120], counts[127], counts[140] = 1, 5000, 1
    frame = pl.DataFrame({"histogram": [counts]})
    from calibcast.engines.html_report.payload import _band

    assert _band(frame["histogram"][0].to_list()) == (1.0, 2.0)
    assert _band([7, *[0] * 255]) == (None, None)


def test_sources_are_relative_to_what_the_users_files_share():
    sources = ["/home/me/net/model.py:3", "/home/me/net/parts/head.py:7", "", "/x/site-packages/torch/nn/a.py:1"]
    assert relative_sources(sources) == ["model.py:3", "parts/head.py:7", "", "torch/nn/a.py:1"]
    assert relative_sources(["net.py:56"]) == ["net.py:56"]


def test_shares_are_never_rounded_to_none_or_all():
    assert [percent(share) for share in (0.0, 1e-5, 0.5, 0.99999, 1.0)] == [
        "0.0%",
        "<0.1%",
        "50.0%",
        ">99.9%",
        "100.0%",
    ]
    assert percent(float("nan")) == "-"


def test_nothing_is_fetched_and_only_the_two_scripts_may_run(made):
    page = html_report(*made[1:])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; script-src &#39;sha256-") or "script-src 'sha256-" in policy
    assert "unsafe-inline' " not in policy.split("style-src")[0]
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', markup)
    assert "http" not in re.sub(r'http-equiv|<p class="of">.*?</p>', "", markup)


def test_summary_tells_what_was_measured_decided_and_judged(made):
    _, ranges, plan = made
    verdict = {"passed": True, "batches": 6, "outputs": [{"output": "output", "sqnr_db": 57.8, "rel_l2": 0.001}]}
    page = html_report(ranges, plan, verdict, title="r.parquet")
    for words in ("3 batches", "torch 2", f"{len(plan.low_precision_nodes)} nodes fp16", "57.8 dB SQNR", "data_max"):
        assert words in page
    assert ">no bounds were set</strong>" in page  # of a file that tells of none
    dated = html_report(ranges, plan, made=date(2026, 11, 28))
    assert f"a model of {len(ranges.calibration.digests)} nodes, 3 batches of data, 2026-11-28" in dated
    assert "No plan was given" in html_report(ranges)


@pytest.mark.parametrize(
    "hostile", ["</script><script>window.pwned=1</script>", '"><img src=x onerror=pwn()>', "\u5c42\U0001f642"]
)
def test_hostile_names_never_reach_the_markup(made, hostile):
    _, ranges, plan = made
    named = dataclasses.replace(
        ranges,
        frame=ranges.frame.with_columns(module=pl.lit(hostile), source=pl.lit(hostile), node="node" + pl.lit(hostile)),
    )
    decisions = tuple(dataclasses.replace(d, module=hostile, reason=hostile, rule=hostile) for d in plan.decisions)
    page = html_report(named, dataclasses.replace(plan, decisions=decisions, notes=(hostile,)), title=hostile)
    if "<" in hostile:
        assert hostile not in page
    assert content_of(page)["tensors"]["module"]["texts"] == [hostile]


def test_three_thousand_tensors_weigh_less_than_six_megabytes():
    """As unlike each other as random numbers are: real tables repeat more."""
    g = torch.Generator().manual_seed(0)
    program = torch.export.export(nn.Identity(), (torch.zeros(2),))
    one = calibrate(program, [torch.zeros(2)], progress=False)
    row = one.frame.to_dicts()[0]
    rows = []
    for i in range(3000):
        counts = [0] * 256
        counts[90:130] = torch.randint(1 << 20, (40,), generator=g).tolist()
        numbers = dict(
            zip(("min", "max", "absmax", "smallest", "mean", "rms"), torch.rand(6, generator=g).tolist(), strict=True)
        )
        names = {
            "node": f"block_{i}_attention_linear",
            "module": f"encoder.layers.{i // 9}.attention.{i}",
            "source": f"model.py:{i}",
        }
        rows.append({**row, **names, **numbers, "histogram": counts})
    ranges = dataclasses.replace(one, frame=pl.DataFrame(rows, schema=one.frame.schema))
    assert len(html_report(ranges).encode()) < 6_000_000


def test_the_command_writes_the_page(made, tmp_path, monkeypatch, capsys):
    _, ranges, plan = made
    monkeypatch.chdir(tmp_path)
    ranges.save("r.parquet")
    plan.save("p.json")
    assert _run(["report", "r.parquet", "--plan", "p.json", "--html", "report.html"]) == 0
    assert "wrote report.html" in capsys.readouterr().err
    content = content_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert content == unpacked(packed(payload(ranges, plan)))
    assert (
        _run(["report", "r.parquet", "--html", "no/such/report.html"]) == 2
    )  # a folder that is not there is a bad command line
    assert _run(["report", "r.parquet", "--html", "r2.html", "--verification", "p.json"]) == 2
    assert "p.json is a plan; a verification report was expected" in capsys.readouterr().err
