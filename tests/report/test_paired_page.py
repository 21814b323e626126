"""The page of two evaluations: every problem with both answers, to be filtered, sorted and found."""

from __future__ import annotations

from pathlib import Path

from megatron_gspo.report.paired_evaluations import compare, write_comparison
from tests.report.browser import Browser
from tests.report.checks import HOSTILE, SCREENS, assert_quiet, overflow
from tests.unit.test_paired_evaluations import FIRST, SECOND, write_evaluation


def page_of(tmp_path: Path, response: str = "seven") -> Path:
    for name, rewards in (("a", FIRST), ("b", SECOND)):
        write_evaluation(tmp_path / name, rewards, response=f"{response} of {name}")
    return write_comparison(compare(tmp_path / "a", tmp_path / "b"), ("a", HOSTILE), tmp_path / "page.html")


def test_problems_can_be_filtered_sorted_and_found(browser: Browser, tmp_path: Path) -> None:
    with browser.open(page_of(tmp_path)) as page:
        names = lambda: page.texts(".prompt-id")  # noqa: E731
        assert page.value("[...byId('filter').options].map((option) => option.text)") == [
            "all problems (4)",
            "A better (1)",
            "B better (1)",
            "both always right (1)",
            "both always wrong (1)",
            "right and wrong answers of one policy (2)",
            "with a truncated response (0)",
            "with a response that was not graded (1)",
        ]
        for chosen, expected in (("first", ["a"]), ("second", ["b"]), ("wrong", ["c"]), ("ungraded", ["d"])):
            page.choose("#filter", chosen)
            assert names() == expected
        page.choose("#filter", "all")
        page.choose("#sort", "hard")
        assert names() == ["c", "a", "b", "d"]
        page.choose("#sort", "difference")
        assert names()[:2] == ["a", "b"]
        page.value("(byId('find').value = 'problem d', byId('find').dispatchEvent(new Event('input')))")
        assert names() == ["d"] and page.text("#note") == "1 of 4 problems."
        assert page.errors == []


def test_the_answers_to_one_seed_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    with browser.open(page_of(tmp_path)) as page:
        page.choose("#filter", "first")
        assert page.texts(".chips button") == ["✓", "✓", "✓", "✗"]
        assert page.texts(".response") == ["seven of a 0", "seven of b 0"]
        page.value("document.querySelectorAll('.chips button')[3].click()")
        assert page.texts(".response") == ["seven of a 1", "seven of b 1"], "of both"
        assert page.texts(".sample .above, .sample .below") == ["right", "wrong"]


def test_the_page_is_quiet_fits_and_shows_hostile_text_as_text(browser: Browser, tmp_path: Path) -> None:
    file = page_of(tmp_path, response=HOSTILE)
    for width, dark in SCREENS:
        with browser.open(file, width=width, dark=dark) as page:
            assert_quiet(page, file)
            assert overflow(page) <= 0
            assert HOSTILE in page.texts(".response")[0]
            assert page.value("document.body.dataset.broken ?? null") is None
