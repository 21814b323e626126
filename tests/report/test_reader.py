"""The report's reader: groups of responses, which can be filtered and sorted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_gspo.report.html import write_report
from tests.report.browser import Browser
from tests.unit.report_runs import make_rollout, make_run


def test_groups_can_be_filtered_and_sorted(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    rewards = {"a": (1.0, 1.0), "b": (0.0, 1.0), "c": (0.0, 0.0)}
    records = [
        replace(make_rollout(3 * group + i), prompt_id=name, group=group, sample=i, reward=reward, clipped=name == "b")
        for group, (name, of_group) in enumerate(rewards.items())
        for i, reward in enumerate(of_group)
    ]
    records[4] = replace(records[4], finish_reason="length")
    run.write_rollouts(0, records)
    with browser.open(write_report([run.path], run.report_file)) as page:
        assert page.value("[...byId('reader-filter').options].map((option) => option.text)") == [
            "all groups (3)",
            "rewards differ (1)",
            "rewards all equal (2)",
            "no reward above 0 (1)",
            "with a clipped response (1)",
            "with a truncated response (1)",
        ]
        names = lambda: page.texts(".prompt-id")  # noqa: E731
        for chosen, expected in (("differ", ["b"]), ("equal", ["a", "c"]), ("wrong", ["c"]), ("clipped", ["b"])):
            page.choose("#reader-filter", chosen)
            assert names() == expected
        page.choose("#reader-filter", "truncated")
        assert names() == ["c"] and page.texts(".sample .mark") == ["truncated"]
        assert page.text("#reader-note").startswith("1 of 3 saved groups of outer step 1, ")
        page.choose("#reader-filter", "all")
        page.choose("#reader-sort", "reward")
        assert names() == ["c", "b", "a"], "by mean reward"
        assert page.texts(".sample .reward")[2:4] == ["reward 0.000", "reward 1.000"]
        page.choose("#reader-sort", "ratio")
        far = {name: max(abs(r.ratio - 1) for r in records if r.prompt_id == name) for name in rewards}
        assert names() == sorted(rewards, key=lambda name: -far[name])
        assert page.errors == []
