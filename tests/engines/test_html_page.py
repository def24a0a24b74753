"""The HTML report in a real browser: headless Chromium opens the file, moves the slider, searches, sorts, prints."""

import dataclasses
import json
import os
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
import torch
from calibcast.calib import calibrate as measure
from calibcast.calib.number_text import percent
from calibcast.engines.html_report import html_report
from calibcast.passes import classify, what_if
from torch import nn

# The rules as they stand without evidence from rounding: tests of plans that have it are in test_rounding_plan.py.
calibrate = partial(measure, rounding_batches=0)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: that of $CHROMIUM, of the system, or playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        found = found or (own if Path(own).exists() else None)
        if found is None:
            pytest.skip(f"no Chromium here (looked for $CHROMIUM, {', '.join(NAMES)}): apt-get install chromium")
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.norm, self.linear, self.gain = nn.LayerNorm(16), nn.Linear(16, 16), gain

    def forward(self, x):
        hidden = torch.relu(self.linear(self.norm(x))) * self.gain
        first, second = hidden.split(8, -1)
        return x + torch.cat([second, first], -1) / self.gain


class Net(nn.Module):
    """Blocks whose peaks reach from tens to a hundred thousand."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(gain) for gain in (10.0, 300.0, 4000.0, 60000.0))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x + 1e-9


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    program = torch.export.export(Net().eval(), (torch.randn(4, 16),))
    ranges = calibrate(program, [torch.randn(4, 16) for _ in range(3)], progress=False)
    return program, ranges, classify(program, ranges)


@pytest.fixture
def show(browser, tmp_path):
    """show(html, width, ...): the opened page; `page.heard` has its console errors, exceptions and requests."""
    contexts = []

    def show(html, width=1280, **options):
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda request: page.heard.append(request.url) if request.url != file.as_uri() else None)
        page.on("dialog", lambda dialog: page.heard.append(dialog.message) or dialog.dismiss())
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]", timeout=300_000)
        return page

    yield show
    for context in contexts:
        context.close()


@pytest.fixture
def page(show, made):
    return show(html_report(*made[1:], title="r.parquet"))


def ask(page, data_max, low_type="float16"):
    page.check(f'input[name="type"][value="{low_type}"]')
    page.fill("#limit-text", str(data_max))
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def counts(page):
    return int(page.inner_text("#nodes-low")), int(page.inner_text("#nodes-high"))


def column(page, key):
    names = [button.get_attribute("data-key") for button in page.query_selector_all("#rows thead button")]
    place = names.index(key) + 2
    return [cell.inner_text() for cell in page.query_selector_all(f"#rows tbody td:nth-child({place})")]


def test_it_opens_without_an_error_or_a_request(page):
    assert page.heard == []
    assert page.title() == "r.parquet: calibcast range report"
    for chart in ("network", "heat", "histogram"):
        assert page.query_selector(f"#{chart} .main-svg") is not None


def test_it_opens_as_planned(page, made):
    assert counts(page) == (len(made[2].low_precision_nodes), len(made[2].high_precision_nodes))
    assert page.input_value("#limit-text") == "512"
    assert page.inner_text("#flips-low") == page.inner_text("#flips-high") == ""


@pytest.mark.parametrize("low_type", ["float16", "bfloat16"])
def test_the_slider_gives_the_numbers_of_what_if(page, made, low_type):
    program, ranges, plan = made
    limits = [1.0, 20.0, 512.0, 1024.0, 12345.0, 1e6, float("inf")]
    frame = what_if(program, ranges, limits, low_type, base=plan)
    for row in frame.iter_rows(named=True):
        ask(page, row["data_max"], low_type)
        assert counts(page) == (row["nodes_low"], row["nodes_high"])
        assert page.inner_text("#work-share") == percent(row["work_share"])
        for flips, names in (("#flips-low", row["to_low"]), ("#flips-high", row["to_high"])):
            assert page.inner_text(flips).partition(": ")[2] == ", ".join(names)
    assert frame["nodes_low"].n_unique() > 3
    page.click("#reset")
    assert counts(page) == (len(plan.low_precision_nodes), len(plan.high_precision_nodes))
    assert page.heard == []


@pytest.fixture(scope="module")
def measured(made):
    """As `made`, with evidence from rounding: the plan meets a budget."""
    g = torch.Generator().manual_seed(0)
    ranges = measure(made[0], [torch.randn(4, 16, generator=g) for _ in range(2)], progress=False)
    return made[0], ranges, classify(made[0], ranges)


def test_the_slider_of_a_plan_for_a_budget_gives_the_numbers_of_what_if(show, measured):
    program, ranges, plan = measured
    page = show(html_report(ranges, plan))
    assert page.is_checked('input[name="question"][value="budget"]')
    assert page.input_value("#limit-text") == "40"
    assert counts(page) == (len(plan.low_precision_nodes), len(plan.high_precision_nodes))
    budgets = [20.0, 40.0, 64.0, 66.0, 68.0, 70.0, 72.0, 80.0, 100.0]
    frame = what_if(program, ranges, (None,), "float16", min_sqnr_db=budgets, base=plan)
    for row in frame.iter_rows(named=True):
        ask(page, row["min_sqnr_db"])
        assert counts(page) == (row["nodes_low"], row["nodes_high"])
        assert page.inner_text("#flips-high").partition(": ")[2] == ", ".join(row["to_high"])
    assert frame["nodes_low"].n_unique() > 2
    ask(page, -3)
    assert page.inner_text("#limit-problem") == "a budget is a number of dB above 0; it stays 100"
    page.check('input[name="question"][value="data_max"]')
    assert page.inner_text("#limit-label") == "data_max"
    assert page.input_value("#limit-text") == "512"
    page.click("#reset")
    assert counts(page) == (len(plan.low_precision_nodes), len(plan.high_precision_nodes))
    assert page.heard == []


def test_a_budget_that_is_shown_is_one_that_the_node_still_meets(show, measured):
    page = show(html_report(*measured[1:]))
    shown = dict(zip(column(page, "node"), column(page, "budget"), strict=True))
    finite = {n: b for n, b in measured[2].budgets["float16"].items() if b not in (None, float("inf")) and n in shown}
    assert finite
    for node, highest in finite.items():
        assert float(shown[node]) <= highest
        assert float(shown[node]) == pytest.approx(highest, rel=1e-4)


def test_the_slider_itself_moves_with_the_keyboard(page):
    page.focus("#limit")
    page.keyboard.press("End")
    assert page.input_value("#limit-text") == "inf"
    page.keyboard.press("ArrowLeft")
    assert float(page.input_value("#limit-text")) > 65536
    most = counts(page)[0]
    page.keyboard.press("Home")
    page.wait_for_function("most => Number(document.getElementById('nodes-low').textContent) < most", arg=most)


def test_a_limit_that_is_no_number_changes_nothing(page):
    was = counts(page)
    ask(page, "many")
    assert counts(page) == was
    assert page.get_attribute("#limit-text", "aria-invalid") == "true"
    assert page.inner_text("#limit-problem") == "data_max is a number above 0, or inf; it stays 512"
    ask(page, 1024)
    assert page.inner_text("#limit-problem") == ""


def test_the_table_sorts_by_any_column_with_the_keyboard(page, made):
    assert column(page, "node")[0] == made[1].frame.sort("absmax", descending=True)["node"][0]
    page.focus('#rows thead button[data-key="smallest"]')
    page.keyboard.press("Enter")
    values = [float(text) for text in column(page, "smallest") if text]
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Enter")
    values = [float(text) for text in column(page, "smallest") if text]
    assert values == sorted(values)
    page.click('#rows thead button[data-key="node"]')
    assert column(page, "node") == sorted(column(page, "node"))
    assert page.get_attribute('#rows thead th:has(button[data-key="node"])', "aria-sort") == "ascending"


def test_search_finds_modules_rules_and_words_together(page, made):
    page.fill("#search", "blocks.2 relu")
    assert column(page, "node") == ["relu_2"]
    assert "1 of " in page.inner_text("#found")
    page.fill("#search", "literal")
    literal = {d.node for d in made[2].decisions if "literal" in (d.rule or "")}
    assert literal <= set(column(page, "node"))
    page.fill("#search", "no such thing")
    assert column(page, "node") == []


def test_chosen_nodes_are_copied_as_nodes_to_exclude(page, made):
    program, ranges, _ = made
    page.fill("#search", "aten.linear.default")
    page.click("#choose-found")
    page.click("#copy")
    patterns = json.loads(page.input_value("#copied"))
    again = classify(program, ranges, data_max=float("inf"), nodes_to_exclude=patterns)
    excluded = {d.node for d in again.decisions if d.rule == "nodes_to_exclude"}
    assert excluded == {"linear", "linear_1", "linear_2", "linear_3"}
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in patterns)
    page.click("#choose-none")
    assert page.is_disabled("#copy")


def test_a_tensor_is_chosen_from_the_table_and_by_name(page):
    page.click('#rows tbody button:text-is("relu_3")')
    assert page.input_value("#chosen") == "relu_3"
    assert "aten.relu.default" in page.inner_text("#told")
    page.fill("#chosen", "relu_1")
    page.dispatch_event("#chosen", "change")
    assert "blocks.1" in page.inner_text("#told")


def test_bars_beyond_the_low_type_are_seen(page):
    """They are hatched over their own colour, not drawn in that of the background."""
    page.fill("#chosen", "mul_3")
    page.dispatch_event("#chosen", "change")
    bars = "() => document.getElementById('histogram').data.filter((t) => t.x.length).map((t) => [t.name, t.marker])"
    found = dict(page.evaluate(bars))
    assert set(found) >= {"within fp16", "beyond fp16, or next to it"}
    assert all(marker["pattern"]["fillmode"] == "overlay" for marker in found.values())
    assert len({marker["color"] for marker in found.values()}) == len(found)


def test_hover_says_node_module_numbers_and_reason(page):
    texts = page.evaluate("() => document.getElementById('network').data.flatMap((trace) => trace.text || [])")
    text = next(text for text in texts if text.startswith("<b>relu_2</b>"))
    for words in ("aten.relu.default blocks.2", ".py:", "min 0, max ", ": its"):
        assert words in text


def test_weights_are_shown_when_asked_for(page, made):
    points = "() => document.getElementById('network').data.reduce((n, t) => n + (t.customdata || []).length, 0)"
    before = page.evaluate(points)
    page.check("#weights")
    weights = made[1].frame.filter((pl.col("kind") == "parameter") & (pl.col("absmax") > 0)).height
    assert page.evaluate(points) == before + weights


def test_the_banner_says_what_is_worst_and_how_far_it_is(page, show, made):
    assert page.inner_text("#h-risk").startswith("Not judged yet")
    peak = made[1].frame.filter(pl.col("kind") == "activation")["absmax"].max()
    assert f"{peak / 65504:.2g}x over fp16" in page.inner_text(".banner")
    judged = show(html_report(*made[1:], {"passed": False, "verdict": "failed: 57.8 < 400 dB", "batches": 2}))
    assert judged.inner_text("#h-risk") == "Accuracy gate: failed: 57.8 < 400 dB"
    assert "bad" in judged.get_attribute(".banner", "class")


def test_a_click_on_a_rule_filters_the_table(page, made):
    stays = {d.node for d in made[2].decisions if d.rule == "data_max"}
    page.click('#rules button[data-rule="data_max"]')
    assert set(column(page, "node")) == stays
    assert "with rule data_max" in page.inner_text("#found")
    assert set(column(page, "type")) == {"fp32"}
    page.click("#all-rules")
    assert len(column(page, "node")) > len(stays)


def test_a_threshold_that_is_shown_is_one_at_which_the_node_flips(page, made):
    """Rounded up, never down: typing what the table shows makes the node low."""
    shown = dict(zip(column(page, "node"), column(page, "flip"), strict=True))
    flips = {node: flip for node, flip in made[2].flips["float16"].items() if flip not in (None, 0.0, float("inf"))}
    assert len(flips) > 5
    for node, flip in flips.items():
        assert flip <= float(shown[node]) <= flip * 1.001, node


def test_every_node_has_a_row_also_without_a_floating_tensor(page, made):
    assert {d.node for d in made[2].decisions} <= set(column(page, "node"))


def test_what_passes_the_low_type_is_red_and_follows_the_type(page, made):
    red = "() => [...document.querySelectorAll('#rows tbody tr')].filter((r) => r.querySelector('td.bad')).length"
    over = made[1].frame.filter(pl.col("kind").is_in(["input", "activation"]) & (pl.col("absmax") > 65504)).height
    assert page.evaluate(red) == over > 0
    ask(page, 512, "bfloat16")
    assert page.evaluate(red) == 0


def test_modules_stand_in_bands_under_the_network(page):
    labels = "() => document.getElementById('network').layout.annotations.map((note) => note.text)"
    assert {"blocks.0", "blocks.3"} <= set(page.evaluate(labels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_or_overlaps(show, made, width, scheme):
    """No text is wider than its box, no box wider than the page, and neighbours do not overlap, at both widths."""
    page = show(html_report(*made[1:], title="a" * 200), width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll("p, dd, dt, td, th, button, label, h1, h2, h3, legend, .scroll")]
            .filter((box) => box.offsetParent && getComputedStyle(box).position !== "absolute")
            .filter((box) => box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0)
            .map((box) => box.outerHTML.slice(0, 120))"""
    )
    assert cut == []
    overlapping = page.evaluate(
        """() => {
            const of = ".row > *, header > *, .tiles > *, main > section, #rows tbody tr";
            const boxes = [...document.querySelectorAll(of)].filter((box) => box.offsetParent);
            const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
                && a.top < b.bottom - 1 && b.top < a.bottom - 1;
            const found = [];
            boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
                if (a.parentNode === b.parentNode && meet(a.getBoundingClientRect(), b.getBoundingClientRect()))
                    found.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80)]);
            }));
            return found;
        }"""
    )
    assert overlapping == []
    assert page.heard == []


def test_colours_have_enough_contrast_in_both_themes(page):
    """WCAG: 4.5 to 1 for text, 3 to 1 for marks."""
    contrast = """(names) => {
        const style = getComputedStyle(document.documentElement);
        const light = (hex) => { const c = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
        const back = light(style.getPropertyValue("--back").trim());
        return names.map((name) => { const l = light(style.getPropertyValue(name).trim());
            return (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05); }); }"""
    for _ in range(2):
        page.click("#theme")
        assert min(page.evaluate(contrast, ["--text", "--soft", "--link", "--good", "--bad"])) >= 4.5
        assert min(page.evaluate(contrast, ["--low", "--high", "--kept", "--input", "--weight"])) >= 3


def test_it_prints_without_controls_and_within_the_paper(page):
    page.emulate_media(media="print")
    assert not page.is_visible("#search")
    assert not page.is_visible("#limit")
    assert page.is_visible("#nodes-low")
    assert len(page.pdf(format="A4")) > 10_000
    assert page.heard == []


def test_hostile_names_are_text(show, made):
    """HTML, quotes, entities, very long paths and other scripts, in nodes, modules, files, rules and reasons."""
    _, ranges, plan = made
    names = [
        "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "<!--", "'\"`${alert(3)}", "&lt;b&gt;",
        "<a href='javascript:alert(4)'>x</a>", "\u5c42.\U0001f642.\u0646\u0635", "deep." * 80, "\u202egnp.exe",
        "__proto__",
    ]  # fmt: skip
    rename = {node: names[i] if i < len(names) else node for i, node in enumerate(dict.fromkeys(ranges.frame["node"]))}
    spoilt = [names[i % len(names)] for i in range(len(ranges))]
    frame = ranges.frame.with_columns(
        pl.col("node").replace(rename), module=pl.Series(spoilt), source=pl.Series(spoilt), op=pl.Series(spoilt)
    )
    decisions = tuple(
        dataclasses.replace(d, node=rename.get(d.node, d.node), module=names[0], rule=names[1], reason=names[i % 10])
        for i, d in enumerate(plan.decisions)
    )
    html = html_report(
        dataclasses.replace(ranges, frame=frame), dataclasses.replace(plan, decisions=decisions, notes=(names[1],)),
        title=names[0],
    )  # fmt: skip
    page = show(html, 400)
    assert page.heard == []
    assert set(names) <= set(column(page, "node"))
    assert page.inner_text(".of") == names[0]
    page.check("#weights")
    page.fill("#chosen", names[1])
    page.dispatch_event("#chosen", "change")
    box = page.query_selector("#network").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.query_selector("main img, main a, #network a, #network img") is None
    assert page.heard == []


def test_without_a_plan_or_histograms_the_ranges_are_shown(show):
    program = torch.export.export(Net().eval(), (torch.randn(4, 16),))
    ranges = calibrate(program, [torch.randn(4, 16)], progress=False, histogram=False)
    page = show(html_report(ranges))
    assert page.heard == []
    assert not page.is_visible("#limit")
    assert len(column(page, "node")) == len(ranges)
    assert "without histograms" in page.inner_text("#heat")


def test_thousands_of_tensors_open_and_answer_soon(show, made):
    """The times themselves are in `benchmarks/`; here only that nothing hangs, on a machine that does other things."""
    _, ranges, plan = made
    copies = -(-3000 // len(ranges))
    frame = pl.concat(
        ranges.frame.with_columns(node=pl.col("node") + f"_{i}" if i else pl.col("node")) for i in range(copies)
    )
    page = show(html_report(dataclasses.replace(ranges, frame=frame.head(3000)), plan))
    unmeasured = {d.node for d in plan.decisions} - set(frame.head(3000)["node"])
    assert f"{3000 + len(unmeasured)} of " in page.inner_text("#found")
    page.fill("#search", "relu")
    page.click("#more")
    assert page.heard == []


@pytest.mark.parametrize("width", [1280, 400])
def test_labels_of_lines_stand_beside_the_data_and_never_on_each_other(show, made, width):
    """Also where data_max is the largest value of fp16, so that two lines lie on each other."""
    page = show(html_report(*made[1:], title="r.parquet"), width)
    ask(page, 65504)
    boxes = """(id) => [...document.querySelectorAll(`#${id} .annotation-text-g`)]
        .map((label) => label.getBoundingClientRect()).map((box) => [box.left, box.right, box.top, box.bottom])"""
    edge = "(id) => document.querySelector(`#${id} .nsewdrag`).getBoundingClientRect().right"
    for chart in ("network", "heat"):
        beside = [box for box in page.evaluate(boxes, chart) if box[0] >= page.evaluate(edge, chart) - 1]
        assert len(beside) == {"network": 3, "heat": 2}[chart]
        assert all(right <= width for _, right, _, _ in beside)
        ordered = sorted(beside, key=lambda box: box[2])
        assert all(above[3] <= below[2] + 2 for above, below in pairwise(ordered))
