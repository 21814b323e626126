"""The comparison's page in a browser: what a reader sees equals what the digests hold, arms go on and off, nothing
overlaps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.report.comparison import draw
from megatron_gspo.report.comparison.cells import Comparison, read
from tests.report.browser import Browser, Page
from tests.report.checks import CONTRASTS, HOSTILE, assert_quiet, overflow
from tests.unit.comparison_cases import MATRIX, effects, make_comparison, make_digest, make_plan, write

ARMS = (*MATRIX, "grpo-dense", "gspo-dense")
SEEDS = 12


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two losses, three replay modes and a dense twin: as many arms and labels as the real one has."""
    return drawn(make_comparison(tmp_path_factory.mktemp("matrix") / "out", ARMS, seeds=SEEDS, final=effects))


@pytest.fixture(scope="module")
def comparison(out: Path) -> Comparison:
    return read(out)


@pytest.fixture(scope="module")
def page(browser: Browser, out: Path) -> Iterator[Page]:
    with browser.open(out / "report.html") as page:
        yield page


def drawn(out: Path) -> Path:
    draw(out)
    return out


def plot(page: Page, title: str) -> str:
    """The expression that is the plot of the chart with this title."""
    index = page.value(f"CHARTS.findIndex((chart) => chart.title === {json.dumps(title)})")
    assert index >= 0, title
    return f"byId('chart-{index}')"


def curves(page: Page, title: str) -> dict[str, Any]:
    """Arm -> the mean that is drawn of it, without the bands under it."""
    found = page.value(f"{plot(page, title)}.data.filter((t) => t.customdata).map(({{ name, x, y }}) => [name, x, y])")
    return {name: (x, y) for name, x, y in found}


OVERLAPS = """(() => {
  const near = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const boxes = (nodes) => [...nodes].map((node) => [node, node.getBoundingClientRect()]);
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const words = [...plot.querySelectorAll("text")].filter((n) => n.textContent.trim() && !n.closest(".hoverlayer"));
    const texts = boxes(words), marks = boxes(plot.querySelectorAll(".point"));
    texts.forEach(([a, at], i) => [...texts.slice(i + 1), ...marks].forEach(([b, other]) => {
      if (at.width && near(at, other)) found.push([plot.ariaLabel, a.textContent, b.textContent]);
    }));
  }
  return found;
})()"""
"""Texts of one plot that lie on each other or on a point."""


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_quiet_fits_and_can_be_read(browser: Browser, out: Path, width: int) -> None:
    with browser.open(out / "report.html", width=width) as page:
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.wait("byId('chart-0').layout.font.color === css('--text')")  # drawn again in the scheme's colours
            assert overflow(page) == 0
            assert page.value(OVERLAPS) == []
            contrasts = page.value(CONTRASTS)
            assert len(contrasts) > 600
            assert [found for found in contrasts if found[0] < 4.5] == []
        assert_quiet(page, out / "report.html")


def test_every_axis_has_a_title_and_every_chart_a_unit(page: Page) -> None:
    units = page.value("CHARTS.map(({ unit }) => unit)")
    layouts = "CHARTS.map((_, i) => byId(`chart-${i}`).layout)"
    titles = page.value(f"{layouts}.map(({{ xaxis, yaxis }}) => [xaxis.title.text, yaxis.title?.text])")
    assert all(unit in title for unit, title in zip(units, titles, strict=True))
    assert {title[0] for title in titles} >= {"outer step", "layer, from 0", "mini-batch of the outer step"}


def test_curves_are_means_over_seeds(page: Page, comparison: Comparison) -> None:
    found = curves(page, "Gradient norm")
    assert list(found) == list(ARMS)
    for arm, (x, y) in found.items():
        columns = zip(*(cell.series("grad_norm") for cell in comparison.of(arm).values()), strict=True)
        assert x == list(range(1, 13))
        assert y == [pytest.approx(sum(column) / SEEDS, rel=1e-3) for column in columns]


def test_the_band_is_the_interval_the_extremes_or_every_seed(page: Page, comparison: Comparison) -> None:
    edges = f"{plot(page, 'Entropy')}.data.filter((t) => t.name === 'gspo-r3' && !t.customdata).map(({{ y }}) => y[4])"
    values = [cell.series("entropy")[4] for cell in comparison.of("gspo-r3").values()]
    low, high = page.value(edges)
    assert low < sum(values) / SEEDS < high
    page.choose("#bands", "extremes")
    assert page.value(edges) == pytest.approx([min(values), max(values)])
    page.choose("#bands", "seeds")
    assert page.value(edges) == pytest.approx(values)
    page.choose("#bands", "interval")
    assert page.value(edges) == [low, high]


def test_axes_show_what_can_be_and_are_not_stretched_by_bands(tmp_path: Path, browser: Browser) -> None:
    """Two seeds far apart: Student's interval of the reward leaves [0, 1], that of the gradient norm goes below 0."""
    out = make_comparison(tmp_path / "out", ("grpo-off", "gspo-off"), seeds=2)
    for path in out.glob("cells/*/*.json"):
        digest, odd = json.loads(path.read_text()), int(path.stem[-1]) % 2
        series = digest["series"]
        series["reward/mean"] = [0.9 if odd else 0.1] * len(series["reward/mean"])
        series["grad_norm"] = [2.0 if odd else 0.5] * len(series["grad_norm"])
        path.write_text(json.dumps(digest))
    with browser.open(drawn(out) / "report.html") as page:
        reward, norm = (
            page.value(f"{plot(page, title)}._fullLayout.yaxis.range")
            for title in ("Reward on training prompts", "Gradient norm")
        )
        intervals = page.value(f"{plot(page, 'Reward on training prompts')}.data.map(({{ y }}) => y[0])")
    assert min(intervals) < 0 and max(intervals) > 1, "the band does not leave the axis, and nothing is shown"
    assert -0.02 <= reward[0] < 0.1 and 0.9 < reward[1] <= 1.02
    assert norm[0] > math.log10(0.5)


def test_differences_are_drawn_with_their_intervals(page: Page, out: Path) -> None:
    results = [
        one for one in json.loads((out / "comparison.json").read_text())["contrasts"] if one["outcome"] == "reward"
    ]
    rows = page.value(
        f"{plot(page, 'Differences in final reward')}.data.map((t) =>"
        " [t.name, t.x[0], t.x[0] - t.error_x.arrayminus[0], t.x[0] + t.error_x.array[0], t.marker.symbol])"
    )
    assert len(rows) == len(results) == 12
    for (name, value, low, high, symbol), one in zip(rows, results, strict=True):
        assert name == one["name"]
        assert (value, low, high) == pytest.approx([one["mean"][key] for key in ("value", "low", "high")], rel=1e-3)
        assert (symbol == "circle") == (one["verdict"] in ("higher", "lower"))


def test_the_sentences_and_the_tables_say_the_same(page: Page) -> None:
    assert page.texts("#shows li.shown")[0].startswith("gspo-off ended higher than grpo-off, by 0.100 (interval +0.09")
    row = page.texts(".contrasts[data-outcome=reward] tbody tr")[0]
    assert row.split("\t")[:3] == ["gspo-off − grpo-off", "12", "+0.100"]
    assert page.texts("dl.tiles .value")[:3] == ["96/96", "3/11", "0/96"]
    assert page.value("document.querySelectorAll('#cells tbody tr').length") == 96


def test_a_log_axis_has_ticks_a_reader_can_name(page: Page) -> None:
    def ticks(title: str, axis: str) -> list[str]:
        return page.value(f"[...{plot(page, title)}.querySelectorAll('.{axis}tick text')].map((n) => n.textContent)")

    assert {"0.002", "0.01", "0.1"} <= set(ticks("Clipped tokens", "y"))
    assert page.value(f"{plot(page, 'Clipped tokens')}._fullLayout.yaxis.type") == "log"
    assert ticks("Clip fraction between losses", "x") == ["1", "2", "5", "10", "20", "50"]


def test_zero_is_a_gap_on_a_log_axis(page: Page) -> None:
    x, y = curves(page, "Clipped tokens by mini-batch")["gspo-off"]
    assert (x, y) == ([0, 1, 2, 3], [None, *(pytest.approx(0.08 * m / 2) for m in (1, 2, 3))])


def test_drift_is_drawn_by_layer(page: Page, comparison: Comparison) -> None:
    x, y = curves(page, "Routing drift by layer")["grpo-off"]
    cells = comparison.of("grpo-off").values()
    expected = [
        sum(sum(cell.values(f"route/drift/layer_{layer:02d}")) / 12 for cell in cells) / SEEDS for layer in range(4)
    ]
    assert (x, y) == ([0, 1, 2, 3], pytest.approx(expected, rel=1e-3))


def test_pointing_at_a_curve_shows_every_arms_value_and_interval(page: Page) -> None:
    chart = plot(page, "Reward on training prompts")
    x, y = page.value(
        f"(() => {{ const plot = {chart}; plot.scrollIntoView({{ block: 'center' }});"
        " const box = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;"
        " return [box.x + xaxis._offset + xaxis.d2p(9), box.y + yaxis._offset + yaxis._length / 2]; })()"
    )
    page.point(x, y)
    page.wait(f"{chart}.querySelector('.hoverlayer text') !== null")
    hover = page.value(f"{chart}.querySelector('.hoverlayer').textContent")
    value = curves(page, "Reward on training prompts")["gspo-off"][1][9]
    assert f"gspo-off : {value:.4g} (" in hover and "grpo-r2 : " in hover


def test_an_arm_is_switched_off_and_on_with_the_keyboard(page: Page) -> None:
    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if kind == "keyDown" else {}
            page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13, **text)

    page.value("document.querySelector('#visible button:nth-child(1)').focus()")
    press("Enter")
    assert page.value("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert list(curves(page, "Entropy")) == list(ARMS[1:])
    rows = page.value(f"{plot(page, 'Differences in final reward')}.data.map((t) => t.name)")
    assert rows and not any("grpo-off" in name for name in rows)
    assert page.value(OVERLAPS) == []
    press("Enter")
    assert list(curves(page, "Entropy")) == list(ARMS)


def test_all_arms_off_is_an_empty_chart_and_no_error(page: Page) -> None:
    page.value("visible.clear(); drawAll()")
    assert curves(page, "Entropy") == {} and page.errors == []
    page.value("DATA.arms.forEach((_, arm) => visible.add(arm)); drawAll()")
    assert list(curves(page, "Entropy")) == list(ARMS)


def test_hostile_text_is_text(browser: Browser, tmp_path: Path) -> None:
    arm, other = HOSTILE.replace("/", "|"), "grpo-off"
    plan = make_plan((other, "gspo-off"), range(2), [HOSTILE], command=[HOSTILE], versions={HOSTILE: HOSTILE})
    plan["arms"][1] |= {"name": arm, "settings": {HOSTILE: HOSTILE}}
    plan["config"]["model"]["path"] = HOSTILE
    cells = [make_digest(other, seed, HOSTILE, 0.5) for seed in range(2)] + [make_digest("gspo-off", 0, HOSTILE, 0.6)]
    cells[-1]["cell"]["arm"] = arm
    failed = make_digest("gspo-off", 1, HOSTILE, 0.6, status="failed", error=HOSTILE)
    failed["cell"]["arm"] = arm
    out = drawn(write(tmp_path / "out", plan, [*cells, failed]))
    with browser.open(out / "report.html") as page:
        assert page.value("document.body.dataset.broken") is None
        assert page.value("document.querySelectorAll('img, b, script[src]').length") == 0
        assert page.texts("#visible button")[1] == arm
        assert arm in page.value("document.querySelector('.plot .annotation')?.textContent + document.body.innerText")
        assert overflow(page) == 0
        assert_quiet(page, out / "report.html")


def test_one_seed_of_one_arm_and_an_unfinished_matrix_are_a_page(browser: Browser, tmp_path: Path) -> None:
    plan = make_plan(MATRIX, range(4), ["runs/a"])
    bare = make_digest("gspo-off", 2, "runs/a", 0.7)
    bare["series"] = {name: bare["series"][name] for name in ("reward/mean", "entropy")}
    out = drawn(write(tmp_path / "out", plan, [bare]))
    with browser.open(out / "report.html", width=390) as page:
        assert "1 of 24 cells finished" in page.text(".sentence")
        assert page.value("CHARTS.map(({ title }) => title)")[:2] == [
            "Reward on training prompts",
            "Final reward by arm",
        ]
        assert page.value("CHARTS.length") == 5
        assert overflow(page) == 0
        assert_quiet(page, out / "report.html")


def test_nothing_finished_says_so(browser: Browser, tmp_path: Path) -> None:
    out = drawn(write(tmp_path / "out", make_plan(MATRIX, range(4), ["runs/a"]), []))
    with browser.open(out / "report.html") as page:
        assert page.text("#message") == "No cell has finished yet."
        assert "0 of 24 cells finished" in page.text(".sentence")
        assert_quiet(page, out / "report.html")
