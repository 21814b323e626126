"""The report in a browser: what a reader sees equals what the run wrote, and nothing leaves or breaks the page."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.report.html import write_report
from megatron_gspo.report.metrics import by_outer_step
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.types import RolloutRecord
from tests.report.browser import Browser, Page
from tests.report.checks import CONTRASTS, HOSTILE, SCREENS, assert_quiet, overflow
from tests.unit.report_runs import make_config, make_rollout, make_run

INVISIBLE = "a\u202eb\u200fc\u2028d\u2066e\x00f\x1bg\ufeffh\r"
LETTERS = "日本語 العربية עברית 🙂 e\u0301"


def report(*runs: RunDirectory, to: Path | None = None) -> Path:
    return write_report([run.path for run in runs], to or runs[0].report_file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def page_file(run: RunDirectory) -> Path:
    return report(run)


@pytest.fixture(scope="module")
def page(browser: Browser, page_file: Path) -> Page:
    return browser.open(page_file)


@pytest.fixture(scope="module")
def two(browser: Browser, run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """``run`` beside a shorter one with another clip range."""
    other = make_run(
        tmp_path_factory.mktemp("two") / "other", outer_steps=5, seed=7, algorithm={"clip_low": 3e-4, "clip_high": 4e-4}
    )
    return browser.open(report(run, other, to=other.path / "both.html"))


def traces(page: Page, title: str) -> list[dict[str, Any]]:
    """What Plotly holds of the chart with this title: name, x, y of each trace that has points. Steps count from 1."""
    index = page.value(f"CHARTS.findIndex((chart) => chart.title === {json.dumps(title)})")
    return page.value(
        f"byId('chart-{index}').data.filter((t) => t.x[0] !== null).map(({{ name, x, y }}) => ({{ name, x, y }}))"
    )


def points(records: list[dict[str, Any]], metric: str, place: str = "outer_step") -> dict[str, list[float]]:
    found = [(record[place] + 1, record[metric]) for record in records if metric in record]
    return {"x": [x for x, _ in found], "y": [pytest.approx(y, rel=1e-8) for _, y in found]}


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_the_page_is_quiet_fits_and_can_be_read(browser: Browser, page_file: Path, width: int, dark: bool) -> None:
    with browser.open(page_file, width=width, dark=dark) as page:
        assert overflow(page) == 0
        contrasts = page.value(CONTRASTS)
        assert len(contrasts) > 300
        assert [found for found in contrasts if found[0] < 4.5] == []
        backgrounds = page.value("getComputedStyle(document.body).backgroundColor")
        assert (backgrounds == "rgb(20, 23, 27)") == dark
        assert_quiet(page, page_file)


def test_the_headline_is_what_the_metrics_say(page: Page, run: RunDirectory) -> None:
    evaluations = [line for line in run.metrics() if "eval/accuracy" in line]
    shown = dict(zip(page.texts("dl.tiles dt"), page.texts("dl.tiles .value"), strict=True))
    assert shown["eval accuracy"] == f"{evaluations[-1]['eval/accuracy']:.3f}"
    assert shown["greedy accuracy"] == f"{evaluations[-1]['eval/greedy_accuracy']:.3f}"
    rewards = [record["reward/mean"] for record in by_outer_step(run.metrics()) if "reward/mean" in record]
    assert shown["reward"] == f"{sum(rewards[-6:]) / 6:.3f}"
    notes = dict(zip(page.texts("dl.tiles dt"), page.texts("dl.tiles .note"), strict=True))
    change = evaluations[-1]["eval/accuracy"] - 0.6
    assert notes["eval accuracy"] == f"+{change:.3f} from 0.600"
    assert notes["run time"] == "12 of 12 outer steps"


def test_the_points_of_a_chart_are_the_records(page: Page, run: RunDirectory) -> None:
    outer = by_outer_step(run.metrics())
    reward, accuracy, greedy = traces(page, "Reward and accuracy")
    assert reward == {"name": "reward, training prompts", **points(outer, "reward/mean")}
    assert accuracy == {"name": "accuracy, held-out", **points(outer, "eval/accuracy")}
    assert greedy["x"] == [0, 5, 10]
    (gradient,) = traces(page, "Gradient norm")
    assert gradient == {"name": "gradient norm", **points(outer, "grad_norm")}


def test_the_axis_can_be_optimizer_steps_or_hours(page: Page, run: RunDirectory) -> None:
    page.choose("#axis", "step")
    (gradient,) = traces(page, "Gradient norm")
    assert gradient == {"name": "gradient norm", **points(run.metrics(), "grad_norm", "step")}
    page.choose("#axis", "hours")
    (gradient,) = traces(page, "Gradient norm")
    times = [
        sum(value for name, value in line.items() if name.startswith("time/")) for line in by_outer_step(run.metrics())
    ]
    assert gradient["x"][-1] == pytest.approx(sum(times) / 3600, rel=1e-5)
    page.choose("#axis", "outer_step")
    assert traces(page, "Gradient norm")[0]["x"] == list(range(1, 13))


def test_smoothing_is_a_mean_of_the_past_over_the_raw_points(page: Page, run: RunDirectory) -> None:
    raw = [record["entropy"] for record in by_outer_step(run.metrics()) if "entropy" in record]
    page.choose("#smooth", "5")
    below, above = traces(page, "Entropy")
    assert below["y"] == pytest.approx(raw, rel=1e-8)
    assert above["name"] == "entropy, mean of 5"
    assert above["y"] == pytest.approx(
        [sum(part) / len(part) for part in (raw[max(0, i - 4) : i + 1] for i in range(12))]
    )
    page.choose("#smooth", "1")
    assert len(traces(page, "Entropy")) == 1


def test_the_clip_range_is_drawn_into_the_ratios(page: Page) -> None:
    index = page.value("CHARTS.findIndex((chart) => chart.kind === 'ratio')")
    assert page.value(f"byId('chart-{index}').layout.shapes.map((shape) => shape.y0)") == [-1e-3, 1.33e-3]
    assert "Clip range −0.001 … +0.00133." in page.text("#ratio-note")
    low, high = page.value(f"byId('chart-{index}')._fullLayout.yaxis.range")
    assert low < -1e-3 and high > 1.33e-3


def test_pointing_at_a_curve_shows_its_value(page: Page, run: RunDirectory) -> None:
    record = by_outer_step(run.metrics())[6]
    x, y = page.value(
        "(() => { const plot = byId('chart-0'); plot.scrollIntoView({ block: 'center' });"
        " const box = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;"
        f" const y = yaxis.d2p({record['reward/mean']});"
        " return [box.x + xaxis._offset + xaxis.d2p(6), box.y + yaxis._offset + y]; })()"
    )
    page.point(x, y)
    page.wait("byId('chart-0').querySelector('.hoverlayer text') !== null")
    hover = page.value("byId('chart-0').querySelector('.hoverlayer').textContent")
    assert f"{record['reward/mean']:.4f}"[:5] in hover
    assert "reward, training prompts" in hover


def test_time_bars_are_the_seconds_of_each_part(page: Page, run: RunDirectory) -> None:
    bars = {trace["name"]: trace for trace in traces(page, "Time of an outer step")}
    records = by_outer_step(run.metrics())[1:]
    for part in ("rollout", "reward", "logprobs", "train", "sync"):
        assert bars[part]["x"] == list(range(1, 13))
        assert bars[part]["y"] == pytest.approx([record[f"time/{part}"] for record in records], rel=1e-5)


def test_every_chart_says_what_its_metrics_mean(page: Page) -> None:
    page.value("document.querySelectorAll('.about').forEach((node) => { node.open = true; })")
    assert "kl/engine_k3 (nats/token)" in page.texts(".about dt")
    assert "Below the clip range, else rounding is clipped. bf16 noise can reach 3e-4." in page.texts(".about dd")
    assert page.value(
        "document.querySelectorAll('.chart').length === document.querySelectorAll('.about dl dd:first-of-type').length"
    )


def test_a_token_is_shaded_by_its_log_ratio(page: Page, run: RunDirectory) -> None:
    page.choose("#reader-step", "6")
    samples = [make_rollout(i, seed=6) for i in range(4)]
    ratios = [[new - old for new, old in zip(s.new_logprobs, s.old_logprobs, strict=True)] for s in samples]
    sizes = sorted(abs(ratio) for of_one in ratios for ratio in of_one)
    scale = sizes[int(len(sizes) * 0.95)]
    assert float(page.text("#legend-high").removesuffix(" nats")) == pytest.approx(scale, rel=0.05)
    spans = page.value(
        "[...document.querySelectorAll('#samples .sample:nth-of-type(2) .response span')]"
        ".map((span) => [span.textContent, span.title, span.style.backgroundColor])"
    )
    assert [text for text, _, _ in spans] == samples[1].tokens
    for (_, title, shade), ratio in zip(spans, ratios[1], strict=True):
        value = title.split("  ")[1].removesuffix(" nats").replace("−", "-")
        assert float(value) == pytest.approx(ratio, rel=0.01, abs=2e-6)
        assert shade.startswith("rgba(var(--up)" if ratio > 0 else "rgba(var(--down)")
        strength = float(shade.rstrip(")").split(",")[-1])
        assert strength == pytest.approx(0.55 * min(1, abs(ratio) / scale), abs=2e-3)


def test_the_shade_can_be_the_gap_between_trainer_and_engine(page: Page) -> None:
    page.choose("#reader-step", "3")
    page.choose("#reader-shade", "trainer − engine")
    sample = make_rollout(0, seed=3)
    assert sample.old_logprobs is not None and sample.rollout_logprobs is not None
    title = page.value("document.querySelector('#samples .response span').title")
    value = float(title.split("  ")[1].removesuffix(" nats").replace("−", "-"))
    assert value == pytest.approx(sample.old_logprobs[0] - sample.rollout_logprobs[0], abs=2e-7)
    page.choose("#reader-shade", "new − old")


def test_a_group_stands_together_with_its_prompt_and_reference_answer(page: Page, run: RunDirectory) -> None:
    page.choose("#reader-step", "3")
    assert page.text("#reader-note") == "1 of 1 saved groups of outer step 4, rollouts/outer_00003.jsonl."
    assert page.texts(".group > .meta span") == ["p3", "4 of 8 responses", "mean reward 0.500"]
    group = [make_rollout(i, seed=3) for i in range(4)]
    assert page.text(".group .prompt").split("\n")[0] == "digits: 4 9 4 3 1 4 4 3 0 6 8 5"
    assert page.text(".group .reference") == group[0].answer
    assert page.texts(".sample .number") == ["#0", "#1", "#2", "#3"]
    assert page.texts(".sample .reward") == ["reward 0.000", "reward 1.000"] * 2
    assert page.texts(".sample .advantage") == ["advantage −1.00", "advantage +1.00"] * 2
    assert page.texts(".sample .ratio") == [f"s_i {one.ratio:.6f}" for one in group]
    places = "[...document.querySelectorAll('.sample')].map((box) => box.getBoundingClientRect())"
    boxes = page.value(f"{places}.map(({{ x, y }}) => [x, y])")
    assert len({y for _, y in boxes[:3]}) == 1 and len({x for x, _ in boxes[:3]}) == 3, "side by side"


def test_charts_that_are_0_all_along_fold_into_a_line_that_names_them(browser: Browser, page_file: Path) -> None:
    with browser.open(page_file) as page:
        lines = ["0 at every step: Dropped responses", "0 at every step: Engine gap, tail"]
        assert page.texts(".flat > summary") == lines
        shown = page.value("[...document.querySelectorAll('.chart')].filter((c) => c.checkVisibility()).length")
        assert shown == page.value("CHARTS.length") - 2
        index = page.value("CHARTS.findIndex((chart) => chart.title === 'Engine gap, tail')")
        assert page.value(f"byId('chart-{index}').data === undefined"), "nothing is drawn where nobody looks"
        page.value("void ([...document.querySelectorAll('.flat')].at(-1).open = true)")
        page.wait(f"byId('chart-{index}').data && byId('chart-{index}').querySelector('svg').clientWidth > 300")
        assert traces(page, "Engine gap, tail")[0]["y"] == [0] * 12
        assert page.errors == []


def test_switching_a_run_off_hides_it(two: Page) -> None:
    assert two.texts("#visible label") == ["run", "other"]
    names = lambda: {trace["name"].split(" · ")[0] for trace in traces(two, "Reward and accuracy")}  # noqa: E731
    assert names() == {"run", "other"}
    assert "Clip range of run −0.001 … +0.00133. Clip range of other −0.0003 … +0.0004." in two.text("#ratio-note")
    two.value("document.querySelectorAll('#visible input')[1].click()")
    assert names() == {"run"}
    assert "Clip range −0.001 … +0.00133." in two.text("#ratio-note")
    two.value("document.querySelectorAll('#visible input')[1].click()")
    assert names() == {"run", "other"}


def test_what_differs_between_runs_stands_first(two: Page) -> None:
    found = "[...document.querySelectorAll('table.settings tbody tr')]"
    rows = two.value(f"{found}.map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert [row[0] for row in rows[:3]] == ["train.run_dir", "algorithm.clip_low", "algorithm.clip_high"]
    assert rows[1] == ["algorithm.clip_low", "0.001", "0.0003"]
    assert all(row[1] == row[2] for row in rows[3:]) and len(rows) > 40
    assert overflow(two) == 0


def test_two_runs_fit_a_phone(browser: Browser, run: RunDirectory, tmp_path: Path) -> None:
    other = make_run(tmp_path / ("a-run-with-a-very-long-name" * 4), outer_steps=2, seed=1)
    file = report(run, other, to=tmp_path / "both.html")
    with browser.open(file, width=390) as page:
        assert overflow(page) == 0
        assert_quiet(page, file)


def test_hostile_text_is_text(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run<i>", outer_steps=2, model={"path": HOSTILE})
    run.write_manifest(run.manifest() | {"engine": {"name": HOSTILE + "\ud800"}})
    tokens = [HOSTILE, INVISIBLE, LETTERS, "\n"]
    shown = RolloutRecord(HOSTILE, 0, HOSTILE + INVISIBLE, "", tokens, 1.0, 0.5, HOSTILE, 1.0, False, answer=HOSTILE)
    run.write_rollouts(1, [shown])
    with run.rollout_files()[1].open("a") as file:
        file.write('{"prompt": "half \\ud83d", "tokens": ["\\ud800", 7, null], "reward": "NaN", "new_logprobs": "x"}\n')
        file.write('{"prompt": ["x"], "response": "no tokens", "reward": NaN, "ratio": 1e999, "advantage": {}}\n')
    with browser.open(report(run)) as page:
        assert page.value("document.body.dataset.broken") is None
        assert page.value("document.querySelectorAll('img, b, body script ~ script[src]').length") == 0
        spans = page.value(
            "[...document.querySelectorAll('.group:first-child .response span')].map((s) => s.textContent)"
        )
        assert spans[0] == HOSTILE
        assert spans[1] == ("a⟨U+202E⟩b⟨U+200F⟩c⟨U+2028⟩d⟨U+2066⟩e⟨U+0000⟩f⟨U+001B⟩g⟨U+FEFF⟩h⟨U+000D⟩")
        assert spans[2:] == [LETTERS, "↵\n"]
        assert page.value("document.querySelector('.group .prompt').textContent").startswith(HOSTILE)
        assert page.value("document.querySelector('.group .reference').textContent") == HOSTILE
        assert page.texts(".group:nth-child(3) .response") == ["no tokens"]
        assert "reward -" in page.text(".group:nth-child(2) .sample .meta")
        assert overflow(page) == 0
        assert_quiet(page, run.report_file)


def test_a_huge_response_is_cut_in_the_middle_and_says_so(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    tokens = [f"{i} " for i in range(30_000)]
    logprobs = [0.0] * 30_000
    huge = RolloutRecord("p", 0, "x" * 50_000, "", tokens, 1, 0, "length", 1.0, False, logprobs, logprobs, logprobs)
    run.write_rollouts(0, [huge])
    with browser.open(report(run), width=390) as page:
        response = page.value("document.querySelector('.response').textContent")
        assert response.startswith("0 1 2 ") and response.endswith(" 29998 29999 ")
        assert "1999 \n… 26000 tokens left out …\n28000 " in response
        assert "30000 tokens" in page.text(".sample .meta") and "truncated" in page.texts(".sample .mark")
        assert "(30,000 more characters)" in page.value("document.querySelector('.prompt').textContent")
        assert overflow(page) == 0


def test_a_run_that_goes_on_one_that_crashed_and_one_that_was_resumed_say_so(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=5)
    going = {key: value for key, value in run.manifest().items() if key != "ended"} | {"status": "running"}
    run.write_manifest(going)
    with browser.open(report(run)) as page:
        assert page.text(".state") == "running"
        assert "5 of 12 outer steps (20 optimizer steps); about" in page.text(".sentence")
    content = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(content + content.splitlines(keepends=True)[-4] + content[-50:-9])
    elsewhere = {"machine": "another", "pid": 1, "started": 0.0}
    run.write_manifest(going | {"starts": [{"outer_step": 0}, {"outer_step": 2}], "process": elsewhere})
    long_ago = time.time() - 7200
    for path in (run.metrics_file, run.manifest_file):
        os.utime(path, (long_ago, long_ago))
    with browser.open(report(run)) as page:
        assert page.text(".state") == "silent"
        assert ", 2h00m before this page; 5 of 12 outer steps" in page.text(".sentence")
        assert "resumed after outer step 2" in page.text(".sentence")
        shapes = "byId('chart-0').layout.shapes.map((shape) => [shape.x0, shape.label.text])"
        assert page.value(shapes) == [[2, "resumed"], [4, "resumed"]]
        page.choose("#axis", "step")
        assert page.value(shapes) == [[8, "resumed"], [16, "resumed"]]
        assert page.errors == []


@pytest.mark.parametrize("files", [["config.toml"], ["manifest.json"], ["metrics.jsonl"]])
def test_an_empty_or_torn_run_is_still_a_page(browser: Browser, tmp_path: Path, files: list[str]) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    for path in (run.config_file, run.manifest_file, run.metrics_file):
        path.write_text("" if path.name in files else path.read_text()[: path.stat().st_size // 2])
    with browser.open(report(run), width=390) as page:
        assert page.text(".state") == "unknown"
        assert overflow(page) == 0
        assert_quiet(page, run.report_file)


def test_a_run_without_a_line_says_that(browser: Browser, tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    with browser.open(report(run)) as page:
        assert page.text("#message") == "No metrics were written yet."
        assert_quiet(page, run.report_file)


def test_one_step_is_seen(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    with browser.open(report(run)) as page:
        reward = traces(page, "Reward and accuracy")[0]
        assert (reward["x"], len(reward["y"])) == ([1], 1)
        drawn = page.value("document.querySelectorAll('#chart-0 .points path').length")
        assert drawn >= 3, "single points have markers"
        assert not math.isnan(reward["y"][0])


def test_a_thinned_curve_says_so_and_is_not_smoothed(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    lines = [{"step": step, "outer_step": step // 4, "minibatch": step % 4, "grad_norm": 1.0} for step in range(2004)]
    lines[1234]["grad_norm"] = 77.0
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with browser.open(report(run)) as page:
        page.choose("#smooth", "5")
        assert len(traces(page, "Gradient norm")) == 2, "by outer step nothing is thinned"
        assert "Long curves" not in page.text("#axis-note")
        page.choose("#axis", "step")
        (curve,) = traces(page, "Gradient norm")
        assert (max(curve["y"]), curve["x"][curve["y"].index(77.0)]) == (77.0, 1235)
        assert len(curve["x"]) < 2000
        assert "Long curves keep the smallest and the largest value" in page.text("#axis-note")


def test_charts_of_components_sources_and_suites_say_what_their_metrics_are(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    names = ("reward/component/passed", "source/math/reward", "eval/aime24/accuracy")
    lines = [json.loads(line) | dict.fromkeys(names, 0.5) for line in run.metrics_file.read_text().splitlines()]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with browser.open(report(run)) as page:
        told = page.value(
            "Object.fromEntries([...document.querySelectorAll('.chart')].map((card) => "
            "[card.querySelector('h3').textContent, card.querySelector('dt')?.textContent]))"
        )
    assert told["Components of the reward"] == "reward/component/NAME (reward)"
    assert told["Reward by source"] == "source/NAME/reward (reward)"
    assert told["Suites"] == "eval/SUITE/accuracy (fraction)"
