"""An engine watched in service: what it says, what it writes, and that it stands in nobody's way."""

import threading
import warnings

import calibcast
import pytest
import torch
from calibcast.calib.errors import SettingError
from calibcast.calib.ranges import RangeTable
from calibcast.engines.cli import _run
from calibcast.engines.engine import Engine


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, more):
        hidden = self.second(self.first(x).relu() + more["k"])
        values, places = hidden.topk(2)
        return {"hidden": hidden, "values": values, "places": places, "same": x}


class Squares(torch.nn.Module):
    def forward(self, x):
        return x * x


class Cube(torch.nn.Module):
    def forward(self, x):
        return x * x * x


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return self.total * 2


def batches(count=4, scale=1.0, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [
        ((scale * torch.randn(4, 8, generator=numbers), {"k": torch.randn(4, 8, generator=numbers)}), {})
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), batches(1)[0][0])
    ranges = calibcast.calibrate(program, batches(), progress=False, rounding_batches=0)
    plan = calibcast.classify(program, ranges)
    return program, ranges, plan, calibcast.insert_casts(program, plan)


@pytest.fixture
def engine(built):
    _, ranges, plan, mixed = built
    return calibcast.build(mixed, plan, ranges, backend="eager")


def squares(inputs, plan_type=torch.float16):
    program = torch.export.export(Squares().eval(), (inputs[0],))
    ranges = calibcast.calibrate(program, inputs, progress=False, rounding_batches=0)
    plan = calibcast.classify(program, ranges, low_precision_type=plan_type, data_max=float("inf"))
    return calibcast.build(calibcast.insert_casts(program, plan), plan, ranges, backend="eager")


def test_the_data_of_calibration_are_found_to_be_so(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with engine.monitor(every=1) as monitor:
            for args, kwargs in batches():
                engine(*args, **kwargs)
            report = monitor.report()
    assert report.passed
    assert (report.calls, report.watched) == (4, 4)
    assert report.frame["name"].to_list() == ["x", "more['k']", "output['hidden']", "output['values']"]
    assert report.frame["node"].to_list() == ["x", "more_k", "linear_1", "topk"]
    assert report.frame["growth"].to_list() == pytest.approx([1.0] * 4, rel=2e-3)
    assert max(report.frame["unseen"]) == 0.0


def test_its_table_has_the_calibrations_own_numbers(engine, built):
    """The same statistics by the same kernels: of the same batches, the rows of the inputs are equal."""
    monitor = engine.monitor(every=1)
    for args, _ in batches():
        engine(*args)
    ours, theirs = monitor.ranges.frame, built[1].frame
    assert ours.filter(ours["kind"] == "input").equals(theirs.filter(theirs["kind"] == "input"))
    assert sum(ours.row(2, named=True)["histogram"]) == 4 * 32


def test_data_outside_of_the_calibrated_range_are_told_once_for_each_tensor(engine):
    monitor = engine.monitor(every=1)
    (wide, more), _ = batches(1, scale=100.0)[0]
    with pytest.warns(UserWarning, match=r"input x reached .* calibration saw") as told:
        engine(wide, more)
    assert sorted(str(w.message).split(" reached")[0] for w in told) == [
        "engine in service: input x",
        "engine in service: output['hidden']",
        "engine in service: output['values']",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(wide, more)
    assert not monitor.report().passed
    assert {finding.cause for finding in monitor.report().findings} == {"outside"}


@pytest.mark.parametrize(("scale", "silent"), [(1.05, True), (1.3, False)])
def test_a_tenth_beyond_the_calibrated_peak_is_within(scale, silent):
    inputs = [torch.linspace(-1, 1, 8)]
    engine = squares(inputs)
    monitor = engine.monitor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(inputs[0] * scale**0.5)
    assert monitor.report().passed == silent


def test_an_overflow_is_told_before_and_when_it_begins():
    engine = squares([torch.linspace(-100, 100, 8)])  # to 10^4
    monitor = engine.monitor(every=1)
    with pytest.warns(UserWarning, match=r"output reached .* float16 holds 65504: it is about to overflow"):
        engine(torch.full((8,), 220.0))
    with pytest.warns(
        UserWarning, match="output had 8 Inf though all inputs were finite .*float16.*an overflow begins"
    ):
        engine(torch.full((8,), 300.0))
    assert [finding.cause for finding in monitor.report().findings][-1] == "overflow"
    assert monitor.report().frame.row(1, named=True)["nonfinite"] == 8


def test_an_overflow_of_a_model_with_integer_inputs_is_one():
    """Token ids are always finite: there is nothing to look at in what feeds the engine."""
    torch.manual_seed(0)
    cubed = torch.nn.Sequential(torch.nn.Embedding(4, 3), Cube()).eval()
    program = torch.export.export(cubed, (torch.tensor([0, 1]),))
    cubed[0].weight.data[3] = 100.0
    program.state_dict["0.weight"].data[3] = 100.0
    ranges = calibcast.calibrate(program, [torch.tensor([0, 1])], progress=False, rounding_batches=0)
    plan = calibcast.classify(program, ranges, nodes_to_include=[".*"])
    engine = calibcast.build(calibcast.insert_casts(program, plan), plan, ranges, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with engine.monitor(every=1) as monitor:
            engine(torch.tensor([3, 1]))
            causes = {finding.cause for finding in monitor.report().findings}
    assert "overflow" in causes
    assert "nonfinite" not in causes


def test_an_overflow_is_told_where_calibration_only_came_near():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = squares([torch.tensor([200.0, -1.0])])  # 40000, more than half of the limit
        with engine.monitor(every=1, tolerance=10.0) as monitor:
            engine(torch.tensor([205.0, 1.0]))
            assert monitor.report().findings == ()
            engine(torch.tensor([300.0, 1.0]))
            causes = {finding.cause for finding in monitor.report().findings}
    assert causes & {"near_limit", "overflow"}


def test_what_is_fed_with_nan_is_no_overflow():
    engine = squares([torch.linspace(-1, 1, 8)])
    monitor = engine.monitor(every=1)
    with pytest.warns(UserWarning, match="input x had 8 NaN; calibration saw none"):
        engine(torch.full((8,), float("nan")))
    assert {finding.cause for finding in monitor.report().findings} == {"nonfinite"}


def test_data_in_another_unit_are_told_when_a_few_calls_agree():
    engine = squares([torch.linspace(-255, 255, 8)], torch.bfloat16)
    monitor = engine.monitor(every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            engine(torch.linspace(-1, 1, 8))
    with pytest.warns(UserWarning, match="input x peaked at 1 in 8 watched calls; calibration saw 255"):
        engine(torch.linspace(-1, 1, 8))
    assert "faint" in {finding.cause for finding in monitor.report().findings}


def test_one_call_in_so_many_is_watched(engine):
    monitor = engine.monitor(every=5)
    (x, more), _ = batches(1)[0]
    for _ in range(50):
        engine(x, more)
    assert (monitor.calls, monitor.watched) == (50, 10)
    assert monitor.calls == 50  # asking is no call


def test_calls_of_many_threads_are_all_counted(engine):
    monitor = engine.monitor(every=1)
    (x, more), _ = batches(1)[0]
    expected = engine(x, more)["hidden"]
    wrong = []

    def work():
        for _ in range(25):
            if not torch.equal(engine(x, more)["hidden"], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (monitor.calls, monitor.watched) == (101, 101)
    assert monitor.ranges.frame["elements"].to_list()[:2] == [101 * 32, 101 * 32]


def test_the_outputs_are_those_of_the_engine_alone(engine):
    (x, more), _ = batches(1)[0]
    alone = engine(x, more)
    with engine.monitor(every=1):
        watched = engine(x, more)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_it_works_inside_inference_mode_and_outside(engine):
    (x, more), _ = batches(1)[0]
    with torch.inference_mode():
        monitor = engine.monitor(every=1)
        engine(x, more)
    engine(x, more)
    assert monitor.watched == 2


def test_a_call_that_the_engine_refuses_is_not_measured(engine):
    monitor = engine.monitor(every=1)
    with pytest.raises(calibcast.BatchError):
        engine(torch.zeros(3, 8), {"k": torch.zeros(3, 8)})
    assert (monitor.calls, monitor.watched) == (1, 0)
    assert not monitor.report().passed  # nothing was seen


def test_a_monitor_that_fails_lets_the_engine_go_on(engine, monkeypatch, caplog):
    monitor = engine.monitor(every=1)
    monkeypatch.setattr(monitor._tally, "add", lambda *_: 1 / 0)
    (x, more), _ = batches(1)[0]
    assert torch.equal(engine(x, more)["same"], x)
    assert "the monitor stops watching: ZeroDivisionError" in caplog.text
    engine(x, more)
    assert monitor.calls == 1  # no longer asked


def test_a_second_monitor_takes_the_place_of_the_first(engine):
    (x, more), _ = batches(1)[0]
    first, second = engine.monitor(every=1), engine.monitor(every=1)
    engine(x, more)
    assert (first.watched, second.watched) == (0, 1)
    first.stop()
    engine(x, more)
    assert second.watched == 2
    second.stop()
    engine(x, more)
    assert second.watched == 2


def test_state_is_not_disturbed():
    program = torch.export.export(Step().eval(), (torch.ones(2, 4),))
    engine = calibcast.build(program, backend="eager")
    with engine.monitor(every=1):
        given = [float(engine(torch.ones(2, 4))[0]) for _ in range(3)]
    assert given == [4.0, 8.0, 12.0]


def test_without_ranges_nan_and_near_overflow_are_still_told(built):
    _, _, plan, mixed = built
    engine = calibcast.build(mixed, plan, backend="eager")
    monitor = engine.monitor(every=1)
    (x, more), _ = batches(1)[0]
    engine(x, more)
    assert monitor.report().passed
    with pytest.warns(UserWarning, match="input x reached 4e.04, and float16 holds 65504"):
        engine(torch.full((4, 8), 4e4), more)
    assert monitor.ranges.fingerprint != built[1].fingerprint


def test_a_loaded_engine_is_watched_alike(engine, tmp_path):
    engine.save(tmp_path / "engine")
    loaded = Engine.load(tmp_path / "engine")
    monitor = loaded.monitor(every=1)
    for args, _ in batches():
        loaded(*args)
    assert monitor.report().passed


def test_its_table_is_compared_by_diff(engine, built, tmp_path, capsys):
    monitor = engine.monitor(every=1)
    (wide, more), _ = batches(1, scale=100.0)[0]
    with pytest.warns(UserWarning, match="input x reached"):
        engine(wide, more)
    built[1].save(tmp_path / "ranges.parquet")
    monitor.save(tmp_path / "service.parquet")
    assert RangeTable.load(tmp_path / "service.parquet") == monitor.ranges
    paths = [str(tmp_path / "ranges.parquet"), str(tmp_path / "service.parquet")]
    assert _run(["diff", *paths]) == 0
    text = capsys.readouterr().out
    assert "4 tensors before, 4 now; the same graph: 0 new, 0 gone, 3 grew, 0 shrank, 1 same" in text
    assert _run(["diff", *paths, "--fail-on", "headroom=1000"]) == 3
    assert _run(["diff", *reversed(paths)]) == 0
    torch.export.save(built[0], tmp_path / "net.pt2")
    assert _run(["diff", *paths, "--program", str(tmp_path / "net.pt2")]) == 2
    assert "leave --program out" in capsys.readouterr().err


def test_tables_of_several_replicas_merge(engine, built, tmp_path):
    tables = []
    for _ in range(2):
        monitor = engine.monitor(every=1)
        for args, _ in batches():
            engine(*args)
        tables.append(monitor.ranges)
    merged = RangeTable.merge(tables)
    assert merged.calibration.ends_only
    assert merged.calibration.batches == 8
    with pytest.raises(calibcast.MismatchError):
        RangeTable.merge([tables[0], built[1]])


def test_the_ends_of_a_rescaled_network_are_the_networks_own():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x) * 3e4) * 1e-4

    torch.manual_seed(0)
    inputs = [torch.randn(16, 8) * 10 for _ in range(2)]
    program = torch.export.export(Wide().eval(), (inputs[0],))
    ranges = calibcast.calibrate(program, inputs, progress=False, rounding_batches=0)
    fitted = calibcast.rescale(program, ranges)
    assert fitted.exponents
    plan = calibcast.classify(fitted.program, fitted.ranges)
    engine = calibcast.build(calibcast.insert_casts(fitted.program, plan), plan, fitted.ranges, backend="eager")
    monitor = engine.monitor(every=1)
    for x in inputs:
        engine(x)
    report = monitor.report()
    assert report.passed
    assert report.frame["growth"].to_list() == pytest.approx([1.0, 1.0], rel=1e-2)
    assert monitor.ranges.fingerprint == ranges.fingerprint


@pytest.mark.parametrize("wrong", [{"every": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_a_setting_without_sense_is_refused(engine, wrong):
    with pytest.raises(SettingError):
        engine.monitor(**wrong)


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu(built):
    """Watched or not, a call only gives the device work; findings come in a call soon after."""
    _, ranges, plan, mixed = built
    engine = calibcast.build(mixed, plan, ranges, backend="eager", device="cuda")
    (x, more), _ = batches(1, scale=100.0)[0]
    x, more = x.cuda(), {"k": more["k"].cuda()}
    monitor = engine.monitor(every=3)
    engine(x, more)  # compiles what is compiled once
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(4):
                monitor.run(lambda x, more: {"hidden": x, "values": x, "places": x, "same": x}, (x, more), {})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert {f.cause for f in monitor.report().findings} == {"outside"}
    assert monitor.watched == 2


def test_asking_takes_no_turn_and_findings_name_calls_that_there_were(engine):
    """A reader that looks every second must not shift which calls are watched, nor count as calls."""
    (x, more), _ = batches(1)[0]
    plain, asked = engine.monitor(every=5), None
    for _ in range(40):
        engine(x, more)
    asked = engine.monitor(every=5)
    for _ in range(40):
        engine(x, more)
        asked.report()
        assert asked.calls
    assert (asked.calls, asked.watched) == (plain.calls, plain.watched) == (40, 8)
    for _ in range(3):
        asked.report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            engine(x * 100, more)
    numbers = [finding.call for finding in asked.report().findings]
    assert numbers
    assert all(40 <= number < asked.calls for number in numbers)


class Masked(torch.nn.Module):
    def forward(self, x, mask):
        return ((x @ x.transpose(-1, -2)) * 0.3 + mask).softmax(-1) @ x


def test_a_mask_is_no_large_value_though_calibration_left_nothing_out():
    """Prompts of one length in calibration, a padded one in service."""
    x, none = torch.linspace(-2, 2, 32).reshape(1, 4, 8), torch.zeros(4, 4)
    program = torch.export.export(Masked().eval(), (x, none))
    ranges = calibcast.calibrate(program, [(x, none)], progress=False, rounding_batches=0)
    plan = calibcast.classify(program, ranges)
    engine = calibcast.build(calibcast.insert_casts(program, plan), plan, ranges, backend="eager")
    monitor = engine.monitor(every=1)
    for _ in range(10):  # and zeros in a mask are no fainter than the zeros of calibration
        engine(x, torch.triu(torch.full((4, 4), -1e9), 1))
    found = monitor.report().findings
    assert [finding.cause for finding in found if finding.name == "input mask"] == []


def test_numbers_in_its_table_keep_their_heads():
    x = torch.linspace(1, 2, 32) * 1e-20
    engine = squares([x], torch.bfloat16)
    monitor = engine.monitor(every=1)
    with pytest.warns(UserWarning, match="reached"):
        engine(x * 1.2345e22)
    text = str(monitor.report())
    assert "1.235e+22" in text
    assert ".." not in text.splitlines()[-1]
