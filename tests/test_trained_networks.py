"""The benchmark of trained networks: two of them from training to the last row, and the laws that it prints."""

from __future__ import annotations

import sys

import pytest

from benchmarks import trained_networks
from benchmarks.trained import NETWORKS
from benchmarks.trained.judgement import Judged, Noise
from benchmarks.trained.laws import laws
from benchmarks.trained.subject import Entry


def rows_of(monkeypatch, tmp_path, *options: str) -> list[list[str]]:
    output = tmp_path / "found.md"
    monkeypatch.setattr(sys, "argv", ["trained_networks.py", "--output", str(output), *options])
    trained_networks.main()
    lines = [line for line in output.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_two_networks_from_training_to_the_last_row(monkeypatch, tmp_path):
    names = ["physical units", "digits of the demo"]
    rows = rows_of(monkeypatch, tmp_path, "--networks", *names, "--types", "fp16")
    assert [(row[0], row[2]) for row in rows] == [(name, plan) for name in names for plan in trained_networks.PLANS]
    found = {(row[0], row[2]): row for row in rows}
    for name in names:
        tuned, half = found[name, "tune"], found[name, "whole-half"]
        worst_held_out = float(tuned[8].split(",")[1])
        assert worst_held_out >= 38
        assert int(tuned[3]) <= int(found[name, "rules"][3])
        fp32, plan = (float(value) for value in tuned[9].removeprefix("accuracy, %:").split("->"))
        assert fp32 > 90
        assert abs(fp32 - plan) < 1
        assert float(half[8].split(",")[1]) < 20  # both are networks that whole-half gets wrong
    text = (tmp_path / "found.md").read_text()
    assert "wherever any plan is: holds in 2 of 2." in text
    assert "than the rules: holds in 2 of 2." in text


def test_a_missing_package_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setitem(NETWORKS, "MiniLM", Entry(NETWORKS["MiniLM"].make, ("no_such_package",)))
    (row,) = rows_of(monkeypatch, tmp_path, "--networks", "MiniLM")
    assert row[3] == "not installed: no_such_package"


def test_a_network_that_fails_is_a_row(monkeypatch, tmp_path):
    def broken():
        raise ValueError("its weights are gone")

    monkeypatch.setitem(NETWORKS, "MiniLM", Entry(broken))
    (row,) = rows_of(monkeypatch, tmp_path, "--networks", "MiniLM")
    assert row[3] == "failed: ValueError: its weights are gone"


def judged(plan: str, worst: float, bytes_high: int = 0, **more) -> Judged:
    noise = Noise(worst, worst)
    return Judged("net", "fp16", plan, work_low=0.5, bytes_high=bytes_high, calibration=noise, held_out=noise, **more)


@pytest.mark.parametrize(
    ("tuned", "rules", "half", "broken"),
    [
        (judged("tune", 38.1), judged("rules", 60), judged("whole-half", 60), []),
        (judged("tune", 37.9), judged("rules", 60), judged("whole-half", 30), ["37.9 dB, but within it are rules"]),
        (judged("tune", 37.9), judged("rules", 30), judged("whole-half", 20), []),
        (
            judged("tune", 50, 100),
            judged("rules", 50, 90),
            judged("whole-half", 20),
            ["100 bytes in fp32, by rules 90"],
        ),
        (judged("tune", 56, 100), judged("rules", 50, 90), judged("whole-half", 20), []),
        (
            judged("tune", 56, 100, equal_bytes=95),
            judged("rules", 50, 90),
            judged("whole-half", 20),
            ["100 bytes in fp32, by rules 90"],
        ),
        (judged("tune", 56, 100, equal_bytes=90), judged("rules", 50, 90), judged("whole-half", 20), []),
    ],
)
def test_the_laws(tuned, rules, half, broken):
    found = [line for line in laws([rules, tuned, half]) if line.startswith("    - ")]
    assert found == [f"    - not in net, fp16: {text}" for text in broken]
