"""What doctor says of prompts that come from several sources."""

from __future__ import annotations

import json

from tests.unit.doctor_cases import Case


def sources(case: Case, *more: str) -> list[str]:
    rows = [{"prompt": f"{number:012d}=", "answer": f"{number:012d}"} for number in range(100)]
    (case.root / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (case.root / "words.jsonl").write_text('{"prompt": "1=", "answer": "=="}\n')
    listed = ", ".join(
        [
            f'{{ name = "long", path = "{case.root}/train.jsonl", weight = 3.0 }}',
            f'{{ name = "few", path = "{case.root}/few.jsonl", reward = {{ function = "arithmetic" }} }}',
            *more,
        ]
    )
    return ['data.path=""', f"data.sources=[{listed}]"]


def test_sources_are_counted_with_their_shares_and_each_reward_is_called(case: Case) -> None:
    (prompts, *_) = case.checks(*sources(case), "train.outer_steps=10", only="prompts")
    assert prompts.status == "ok"
    # 10 outer steps of 32 prompts: 240 of the 600, 80 of the 100
    assert "in 10 outer steps: long 600 (75% of those drawn, 0.4 epochs), few 100 (25% of those" in prompts.detail
    assert "drawn, 0.8 epochs): 700 prompts, 32 a step" in prompts.detail and prompts.detail.count("epochs") == 2
    found = [check.detail for check in case.checks(*sources(case), only="reward")]
    assert any(text.startswith("source long: exact on prompt 'line-1': 1 for its reference") for text in found)
    assert any(text.startswith("source few: arithmetic on prompt 'line-1': 1 for its reference") for text in found)


def test_a_source_whose_file_is_not_there_or_cannot_be_read_is_named(case: Case) -> None:
    gone = case.check("prompts", *sources(case, f'{{ name = "gone", path = "{case.root}/gone.jsonl" }}'))
    assert gone.status == "error" and f"{case.root}/gone.jsonl: no such data file" in gone.detail
    assert gone.fix == "data.sources.gone.path"
    (case.root / "bad.jsonl").write_text("{\n")
    bad = case.check("prompts", *sources(case, f'{{ name = "bad", path = "{case.root}/bad.jsonl" }}'))
    assert bad.status == "error" and "bad.jsonl, line 1" in bad.detail and bad.fix == "data.sources.bad.path"


def test_references_are_held_against_their_own_source_s_reward(case: Case) -> None:
    words = f'{{ name = "words", path = "{case.root}/words.jsonl", reward = {{ function = "gsm8k" }} }}'
    worst = case.check("reward", *sources(case, words))
    assert worst.status == "error" and worst.detail.startswith("source words: ")
    assert f"{case.root}/words.jsonl, line 1" in worst.detail and "ends in no number" in worst.detail


def test_a_source_s_reward_that_is_none_is_named_with_its_source(case: Case) -> None:
    other = f'{{ name = "other", path = "{case.root}/words.jsonl", reward = {{ function = "maht" }} }}'
    worst = case.check("reward", *sources(case, other))
    assert worst.status == "error" and worst.fix == "data.sources.other.reward"
    assert worst.detail.startswith("source other: reward.function = 'maht' is unknown")


def test_a_setting_of_a_source_that_is_spelt_wrong_brings_the_one_that_was_meant(case: Case) -> None:
    found = case.check("configuration", *sources(case, '{ name = "a", path = "b", limt = 3 }'))
    assert "unknown setting data.sources.2.limt (did you mean limit?)" in found.detail
    found = case.check("configuration", *sources(case, '{ name = "a", path = "b", reward = { functon = "math" } }'))
    assert "unknown setting data.sources.2.reward.functon (did you mean function?)" in found.detail
