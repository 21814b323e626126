"""``megatron-gspo explain``: the same as docs/configuration.md, in a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import RunConfig
from megatron_gspo.config.reference import find, sections, settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
EVERY = [setting for section in RunConfig.model_fields for setting in settings(section)]
Captured = pytest.CaptureFixture[str]


def explain(capsys: Captured, *names: str) -> str:
    assert main(["explain", *names]) == 0
    return capsys.readouterr().out


def refusal(capsys: Captured, name: str) -> str:
    assert main(["explain", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def rows() -> dict[str, tuple[str, str, str]]:
    """section.key -> (value, default, meaning), as the page has them; its Markdown taken off."""
    found, section = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"## `\[(\w+)\]`", line):
            section = heading[1]
        elif row := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line):
            value, default, meaning = re.split(r" (?<!\\)\| ", row[2].replace("`", ""))
            found[f"{section}.{row[1]}"] = (value, default, meaning.replace(r"\|", "|"))
    return found


def test_every_setting_is_explained_in_the_words_of_the_page(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    page = rows()
    assert list(page) == [setting.key for setting in EVERY] and len(page) > 90
    for key, (value, default, meaning) in page.items():
        name, first, second = explain(capsys, key).splitlines()
        assert name == key
        assert first.strip() == f"{value}, {default if default == 'required' else f'default {default}'}"
        assert second.strip() == meaning


def test_a_setting_says_its_type_bounds_default_and_meaning(capsys):
    assert explain(capsys, "optimizer.lr") == "optimizer.lr\n    number > 0, default 1e-06\n    Peak learning rate.\n"
    assert '"gspo", "gspo-token", "grpo", "ppo", "dapo"' in explain(capsys, "algorithm.name")
    assert "string, required" in explain(capsys, "model.path")
    assert "number > 0 and < 1, default 0.0003 (gspo, gspo-token), 0.2 (grpo," in explain(capsys, "algorithm.clip_low")
    assert "Of sapo." in explain(capsys, "algorithm.tau_positive")


def test_a_key_of_one_section_alone_and_what_can_be_copied_are_understood(capsys):
    whole = explain(capsys, "optimizer.lr")
    for written in ("lr", "optimizer.lr=3e-4", "[optimizer.lr]"):
        assert explain(capsys, written) == whole
    assert explain(capsys, "lr", "group_size").count("default") == 2


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_a_section_says_all_of_its_settings_in_order(section, capsys):
    out = explain(capsys, section)
    assert out.startswith(f"[{section}]\n{sections()[section].split()[0]}")
    assert re.findall(rf"^{section}\.(\w+)$", out, re.MULTILINE) == [setting.name for setting in settings(section)]


def test_a_section_that_is_a_key_elsewhere_says_where(capsys):
    assert explain(capsys, "data").rstrip().endswith("See also parallel.data.")


def test_without_a_name_the_sections_are_listed(capsys):
    out = explain(capsys)
    assert re.findall(r"^(\w+)  ", out, re.MULTILINE) == list(RunConfig.model_fields)
    assert "megatron-gspo explain SECTION says every setting of one." in out


@pytest.mark.parametrize("width", [40, 63, 80, 200])
def test_lines_are_as_wide_as_the_terminal_and_no_word_is_lost(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for section in RunConfig.model_fields:
        out = explain(capsys, section)
        assert max(map(len, out.splitlines())) <= width
        meanings = [setting.meaning.replace("`", "") for setting in settings(section)]
        together = " ".join(out.split())
        assert all(meaning in together for meaning in meanings)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimzer", "no setting 'optimzer' (did you mean optimizer?)"),
        ("optimizer.lrr", "no setting 'optimizer.lrr' (did you mean optimizer.lr?)"),
        ("optimiser.lr", "no setting 'optimiser.lr' (did you mean optimizer.lr?)"),
        ("algorithm.lr", "no setting 'algorithm.lr' (keys of algorithm: name, aggregation, credit, "),
        ("grop_size", "no setting 'grop_size' (did you mean rollout.group_size?)"),
        ("learning_rate", "no setting 'learning_rate' (did you mean optimizer.lr or critic.lr?)"),
        ("clip", "did you mean algorithm.clip_low, algorithm.clip_high, algorithm.allow_wide_clip or "),
        ("timeout_s", "3 sections have timeout_s: name one of rollout.timeout_s, sync.timeout_s or reward.timeout_s"),
        ("xyzzy", "no setting 'xyzzy' (sections: model, data, train, "),
        ("", "no setting '' (sections: model, "),
    ],
)
def test_what_is_no_setting_brings_what_may_have_been_meant(name, said, capsys):
    assert said in refusal(capsys, name)


def test_nothing_is_said_when_one_of_several_names_is_wrong(capsys):
    assert main(["explain", "lr", "xyzzy"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("setting", EVERY, ids=lambda setting: setting.key)
def test_a_key_alone_finds_its_setting_when_no_other_section_has_it(setting):
    others = [other for other in EVERY if other.name == setting.name]
    if len(others) == 1 and setting.name not in RunConfig.model_fields:
        assert find(setting.name) == (setting,)
    assert find(setting.key) == (setting,)
