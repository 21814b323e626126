"""What doctor says about where a turn ends, and the prompt that it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_gspo.data import load_tokenizer
from megatron_gspo.doctor.check import Check, one_line
from megatron_gspo.doctor.data import check_prompts
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.model import check_tokenizer
from megatron_gspo.doctor.tokenizer import show_tokens
from megatron_gspo.errors import DataError
from tests.unit import published


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return published.write(tmp_path / "model", "Qwen3")


def make_base(model: Path) -> None:
    """As a base model ships: it stops at <|endoftext|>, and its template ends a turn with <|im_end|>."""
    published.change(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    published.change(model / "generation_config.json", eos_token_id=263)
    published.change(model / "config.json", eos_token_id=263)


def facts(tmp_path: Path, *prompts: Any, **data: Any) -> Facts:
    rows = [{"prompt": prompt, "answer": "4"} for prompt in (prompts or ("2+2?",))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "d.jsonl"), **data},
        "train": {"run_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    return Facts(tmp_path / "run.toml")


def said(checks: list[Check] | Any, text: str) -> Check:
    (found,) = [check for check in checks if text in check.detail]
    return found


def test_a_base_model_whose_template_ends_a_turn_elsewhere_is_warned_of_with_the_setting(
    model: Path, tmp_path: Path
) -> None:
    good = said(check_tokenizer(facts(tmp_path)), "ends a turn with '<|im_end|>' (265), a stop token")
    assert good.status == "ok"
    make_base(model)
    bad = said(check_tokenizer(facts(tmp_path)), "ends a turn with '<|im_end|>' (265), but responses stop only at")
    assert (bad.status, bad.fix) == ("warning", 'rollout.stop_tokens = ["<|im_end|>"]')
    mended = Facts(tmp_path / "run.toml", [bad.fix.replace(" = ", "=")])
    assert {check.status for check in check_tokenizer(mended)} == {"ok"}
    # without the template nothing ends a turn
    assert {check.status for check in check_tokenizer(facts(tmp_path, chat_template=False))} == {"ok"}


def test_the_first_prompt_is_shown_as_the_model_reads_it_with_its_tokens_ends(model: Path, tmp_path: Path) -> None:
    shown = said(check_prompts(facts(tmp_path, "how 東京\x1b\n\n", "other")), "as the model reads it")
    text = "<|im_start|>¦u¦s¦e¦r¦\\n¦h¦ow¦␣¦東京¦\\x1b¦\\n\\n¦<|im_end|>¦\\n¦<|im_start|>¦a¦s¦s¦i¦s¦t¦a¦n¦t¦\\n¦"
    assert shown.status == "ok" and shown.detail.startswith("prompt 'line-1' as the model reads it, 30 tokens")
    assert shown.detail.endswith(text) and one_line(shown.detail) == shown.detail
    off = Facts(tmp_path / "run.toml", ["data.chat_template_kwargs={enable_thinking=false}"])
    assert said(check_prompts(off), "as the model reads it").detail.endswith("<think>¦\\n\\n¦</think>¦\\n\\n¦")


def test_a_long_prompt_is_shown_by_both_its_ends(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("a" * 5 + "b" * 1000 + "c" * 5)
    shown = show_tokens(tokenizer, ids)
    assert shown.startswith("a¦a¦a¦a¦a¦b¦") and " ... 940 tokens ... b¦" in shown and shown.endswith("b¦c¦c¦c¦c¦c¦")
    assert show_tokens(tokenizer, tokenizer.encode("  x ")) == "␣¦␣¦x¦␣¦"


def test_a_variable_that_no_template_reads_is_an_error_of_the_tokenizer(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never reads enable_thinkin"):
        check_tokenizer(facts(tmp_path, chat_template_kwargs={"enable_thinkin": False}))


def test_a_template_in_each_of_two_files_is_warned_of_where_they_differ(model: Path, tmp_path: Path) -> None:
    text = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    (model / "chat_template.jinja").write_text(text + "\n")
    assert {check.status for check in check_tokenizer(facts(tmp_path))} == {"ok"}
    published.change(model / "tokenizer_config.json", chat_template=text.replace("im_end", "im_END"))
    check = said(check_tokenizer(facts(tmp_path)), "read by nothing")
    assert check.status == "warning" and check.detail.startswith(
        f"{model / 'chat_template.jinja'} is the chat template"
    )
