"""The report as a file: every curve's values, hostile text harmless, broken runs readable. tests/report opens it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_config, make_report, make_rollout, make_run

from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.report.charts import CHARTS
from megatron_gspo.report.html import write_report
from megatron_gspo.report.metrics import METRICS, PLACE, by_outer_step
from megatron_gspo.report.payload import curves, hours, time_bars, to_json
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.samples import groups, rollouts
from megatron_gspo.types import RolloutRecord

HOSTILE = '</script><img src=x onerror="document.body.dataset.broken=1"><b>bold\u2028</b> &amp; "quoted"'


class Page(HTMLParser):
    """The elements of a page and the text of each ``<script id=...>``, as a browser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("id") or "") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    @property
    def payload(self) -> dict[str, Any]:
        return json.loads(self.scripts["payload"])


def report_of(*runs: RunDirectory) -> tuple[str, Page]:
    out = write_report([run.path for run in runs], runs[0].path / "report.html")
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_holds_the_values_of_every_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, page = report_of(run)
    (embedded,) = page.payload["runs"]
    for view, records in (("steps", run.metrics()), ("outer", by_outer_step(run.metrics()))):
        series = embedded[view]["series"]
        assert series.keys() == {name for record in records for name in record} - set(PLACE)
        for name, curve in series.items():
            rows = curve.get("rows", range(len(records)))
            assert list(rows) == [row for row, record in enumerate(records) if name in record]
            assert curve["y"] == pytest.approx([records[row][name] for row in rows], rel=1e-8, abs=0)
    assert embedded["steps"]["step"] == [record["step"] + 1 for record in run.metrics()]
    assert embedded["outer"]["outer_step"] == list(range(13)), "0 is before any training, and 1 the terminal's 1/12"
    assert embedded["bars"]["outer_step"] == list(range(1, 13))
    assert [step["outer_step"] for step in embedded["rollouts"]["steps"]] == list(range(1, 13))
    assert embedded["clip"] == [1e-3, 1.33e-3]


def test_s_i_keeps_its_distance_from_1(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    _, page = report_of(run)
    embedded = page.payload["runs"][0]["steps"]["series"]["ratio/p95"]["y"][-1]
    assert embedded - 1 == pytest.approx(make_report(0, 3).metrics["ratio/p95"] - 1, rel=1e-5)


def test_a_long_curve_keeps_every_spike_and_its_order() -> None:
    lines = [{"step": step, "grad_norm": 1.0 + step * 1e-6} for step in range(50_000)]
    lines[31_415]["grad_norm"], lines[27_182]["grad_norm"] = 900.0, -900.0
    (curve,) = curves(lines).values()
    assert curve["thinned"], "means of extremes are no means: the page does not smooth it"
    kept = dict(zip(curve["rows"], curve["y"], strict=True))
    assert len(kept) == 2000
    assert (kept[31_415], kept[27_182]) == (900.0, -900.0)
    assert {0, 49_999} <= kept.keys() and list(kept) == sorted(kept)
    assert all(value == pytest.approx(lines[row]["grad_norm"], rel=1e-8) for row, value in kept.items())


def test_many_outer_steps_share_bars_of_their_mean() -> None:
    lines = [{"outer_step": step, "time/train": float(step), "time/rollout": 1.0} for step in range(300)]
    del lines[1]["time/rollout"]
    bars = time_bars(lines)
    assert (bars["every"], bars["outer_step"][:3]) == (3, [1, 4, 7])
    assert bars["parts"]["time/train"] == [3.0 * i + 1 for i in range(100)]
    assert set(bars["parts"]["time/rollout"]) == {1.0}, "a step that lacks a part is not one of 0 seconds"
    assert bars["parts"]["time/sync"] == [None] * 100


def test_hours_add_up_the_time_split(tmp_path: Path) -> None:
    assert hours([{"outer_step": -1}, {"time/train": 1800.0, "time/sync": 900.0}, {"time/rollout": 900.0}]) == [
        0,
        0.75,
        1,
    ]
    assert hours([{"outer_step": 0}]) is None


def test_every_metric_is_drawn_or_deliberately_not() -> None:
    drawn = {curve.metric for chart in CHARTS for curve in chart.curves}
    assert set(METRICS) - drawn == {"reward/std", "ratio/mean"}
    assert drawn <= set(METRICS)


def test_a_chart_without_data_is_left_out(tmp_path: Path) -> None:
    _, page = report_of(make_run(tmp_path / "run"))
    first, *others = page.payload["sections"]
    titles = [chart["title"] for chart in first["charts"]]
    assert titles[:2] == ["Reward and accuracy", "Response length"]
    assert "Routing" not in {chart["title"] for section in others for chart in section["charts"]}


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text, page = report_of(make_run(tmp_path / "run", outer_steps=2))
    assert not re.search(r"https?://", text)
    links = [attrs for _, attrs in page.elements if {"src", "href"} & attrs.keys()]
    assert links == [{"rel": "icon", "href": "data:,"}], "else a server would be asked for a favicon"
    assert len(text) < 3_000_000


def test_several_runs_share_the_axes_and_differing_settings_are_marked(tmp_path: Path) -> None:
    gspo = make_run(tmp_path / "gspo", outer_steps=3)
    grpo = make_run(
        tmp_path / "grpo", outer_steps=2, seed=1, algorithm={"name": "grpo", "clip_low": 0.2, "clip_high": 0.27}
    )
    text, page = report_of(gspo, grpo)
    first, second = page.payload["runs"]
    assert (first["label"], second["label"]) == ("gspo", "grpo")
    assert (len(first["outer"]["outer_step"]), len(second["outer"]["outer_step"])) == (4, 3)
    assert second["clip"] is None, "a token ratio's clip range has no place on the axis of s_i"
    differing = re.findall(r'<tr class="differs"><th>([^<]+)</th>', text)
    assert differing == ["train.run_dir", "algorithm.name", "algorithm.clip_low", "algorithm.clip_high"]


def test_runs_of_one_name_are_told_apart_and_one_run_twice_is_refused(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a" / "run", outer_steps=1), make_run(tmp_path / "b" / "run", outer_steps=1)
    _, page = report_of(one, two)
    assert [run["label"] for run in page.payload["runs"]] == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match="named twice"):
        write_report([one.path, one.path / "."], tmp_path / "out.html")


def test_the_summary_stands_in_the_page_without_a_script(tmp_path: Path) -> None:
    text, _ = report_of(make_run(tmp_path / "run", outer_steps=10))
    last = 0.6 + 0.3 * (1 - math.exp(-9 / 6))
    assert f'<dd class="value">{last:.3f}</dd><dd class="note">+{last - 0.6:.3f} from 0.600</dd>' in text
    assert "TP2 EP2 DP1 on 2 ranks" in text
    assert "gspo, clip 1 - 0.001 ... 1 + 0.00133" in text
    assert "sglang 0.5.23" in text


def hostile_run(path: Path) -> RunDirectory:
    run = make_run(path, outer_steps=2, model={"path": HOSTILE})
    run.write_manifest(run.manifest() | {"engine": {"name": HOSTILE}})
    record = RolloutRecord(HOSTILE, 0, HOSTILE, HOSTILE, [HOSTILE, "\n"], 1.0, 0.5, HOSTILE, 1.0, False)
    run.write_rollouts(1, [record])
    return run


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    text, page = report_of(hostile_run(tmp_path / "<b>run"))
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags
    assert "b" not in tags
    assert tags.count("script") == 3
    assert "<img" not in text
    (group,) = page.payload["runs"][0]["rollouts"]["steps"][-1]["groups"]
    assert group["samples"][0]["tokens"] == [HOSTILE, "\n"]
    assert group["prompt"] == HOSTILE


def test_json_in_a_script_element_cannot_end_it() -> None:
    text = to_json({"text": HOSTILE})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"text": HOSTILE}


def test_shades_are_differences_of_the_logprobs_that_were_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    record = make_rollout(2)
    without_old = {"rollout_logprobs": [-1.0, -2.0], "new_logprobs": [-1.5, -1.0]}
    run.write_rollouts(0, [record, RolloutRecord("p", 0, "", "ab", ["a", "b"], 0, 0, "stop", **without_old)])
    _, page = report_of(run)
    full, partial = (group["samples"][0] for group in page.payload["runs"][0]["rollouts"]["steps"][0]["groups"])
    assert record.new_logprobs is not None and record.old_logprobs is not None
    expected = [new - old for new, old in zip(record.new_logprobs, record.old_logprobs, strict=True)]
    assert full["shades"]["new − old"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert full["shades"].keys() == {"new − old", "trainer − engine"}
    assert partial["shades"] == {}, "nothing is shaded by logprobs that were not recorded"


def test_rollouts_beyond_the_budget_are_left_out_evenly_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", outer_steps=9)
    size = sum(path.stat().st_size for path in run.rollout_files().values())
    monkeypatch.setattr("megatron_gspo.report.samples.ROLLOUT_BYTES", size // 4)
    found = rollouts(run)
    assert [(step["outer_step"], step["file"]) for step in found["steps"]] == [
        (4, "outer_00003.jsonl"),
        (9, "outer_00008.jsonl"),
    ]
    assert (found["steps_left_out"], found["responses_left_out"]) == (7, 0)
    (last,) = rollouts(run, share=400)["steps"]
    assert (last["outer_step"], [len(group["samples"]) for group in last["groups"]]) == (9, [1])
    assert rollouts(run, share=400)["responses_left_out"] == 3


def test_a_page_has_whole_groups_or_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    records = [replace(make_rollout(sample, seed=group), group=group) for group in range(3) for sample in range(4)]
    run.write_rollouts(0, records)
    whole = rollouts(run)["steps"][0]["groups"]
    assert [(group["prompt_id"], len(group["samples"])) for group in whole] == [("p0", 4), ("p1", 4), ("p2", 4)]
    assert whole[0]["answer"] == records[0].answer and rollouts(run)["group_size"] == 8
    size = len(json.dumps(whole[0]["samples"]))
    monkeypatch.setattr("megatron_gspo.report.samples.ROLLOUT_BYTES", int(2.9 * size))
    monkeypatch.setattr("megatron_gspo.report.samples.math.ceil", lambda ratio: 1)  # the file itself is larger
    found = rollouts(run)
    assert [len(group["samples"]) for group in found["steps"][0]["groups"]] == [4, 4], "not two groups and a half"
    assert found["responses_left_out"] == 4


def test_one_prompt_drawn_twice_is_two_groups_and_a_file_without_groups_goes_by_prompts() -> None:
    lines = [{"group": group, "prompt_id": "p", "sample": sample} for group in (3, 9) for sample in (0, 1)]
    assert [[one["sample"] for one in group["samples"]] for group in groups(lines)] == [[0, 1], [0, 1]]
    earlier = [{"prompt_id": name, "sample": sample} for name, sample in (("a", 2), ("b", 5), ("a", 7))]
    found = groups(earlier)
    assert [(group["prompt_id"], len(group["samples"]), group["answer"]) for group in found] == [
        ("a", 2, None),
        ("b", 1, None),
    ]


def test_a_chart_that_is_0_at_every_step_of_every_run_is_marked_and_others_are_not(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", outer_steps=2)

    def flat(*runs: RunDirectory) -> set[str]:
        sections = report_of(*runs)[1].payload["sections"]
        return {chart["title"] for section in sections for chart in section["charts"] if chart["flat"]}

    assert flat(one) == flat(one, two) == {"Dropped responses", "Engine gap, tail"}
    lines = two.metrics()
    lines[3]["dropped/responses"] = 1.0
    two.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert flat(one, two) == {"Engine gap, tail"}
    still = [line | {name: 1.0 for name in line if name.startswith("ratio/p")} for line in lines]
    still = [{name: value for name, value in line.items() if not name.startswith("noise/")} for line in still]
    two.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in still))
    assert "Sequence ratio" in flat(two), "of s_i, s_i - 1 is drawn"


def test_a_crashed_run_is_still_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=3)
    run.manifest_file.unlink()
    content = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(content[:-40])
    path = run.rollout_files()[2]
    path.write_bytes(path.read_bytes()[:-40])
    text, page = report_of(run)
    (embedded,) = page.payload["runs"]
    assert embedded["steps"]["step"] == list(range(12))
    assert [len(group["samples"]) for group in embedded["rollouts"]["steps"][-1]["groups"]] == [3]
    assert "no manifest" in text


def test_a_run_that_has_only_begun_is_still_a_report(tmp_path: Path) -> None:
    _, page = report_of(RunDirectory.create(make_config(tmp_path / "run")))
    assert page.payload["sections"] == []


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
