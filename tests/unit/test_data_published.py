"""Tokenizers from the files that model families publish: what they encode is what their ``tokenizer.json`` encodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from megatron_gspo.data import load_tokenizer
from megatron_gspo.data.tokenizer import token_texts
from megatron_gspo.errors import DataError
from tests.unit import published

TEXT = "Tom has 2 apples.\n\nHow  many, 1,234.5?\t\u6771\u4eac \u041f\u0440\u0438\u0432\u0435\u0442 \u00bd \U0001f642 "


@pytest.mark.parametrize("name", published.FAMILIES)
def test_a_familys_published_files_give_its_own_tokens_and_text_back(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(published.write(tmp_path, name))
    file = Backend.from_file(str(tmp_path / "tokenizer.json"))
    specials = "".join(f" 1{token.content}2 {token.content}\n" for token in file.get_added_tokens_decoder().values())
    for text in (TEXT, specials):
        ids = tokenizer.encode(text)
        assert ids == file.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    wanted = {file.token_to_id(token) for token in published.FAMILIES[name].eos_ids}
    assert wanted <= set(tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("name", "rendered", "plain", "turn_end"),
    [
        ("Qwen3", "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "2+2?", "<|im_end|>"),
        (
            "DeepSeek-V3",
            f"{published.BOS}<\uff5cUser\uff5c>2+2?<\uff5cAssistant\uff5c>",
            f"{published.BOS}2+2?",
            published.EOS,
        ),
        ("OLMoE", "|||IP_ADDRESS|||<|user|>\n2+2?\n<|assistant|>\n", "2+2?", "|||IP_ADDRESS|||"),
        ("GLM-4.5", "[gMASK]<sop><|user|>\n2+2?<|assistant|>", "2+2?", None),
    ],
)
def test_prompts_and_the_end_of_a_turn_are_those_of_the_familys_template(
    tmp_path: Path, name: str, rendered: str, plain: str, turn_end: str | None
) -> None:
    tokenizer = load_tokenizer(published.write(tmp_path, name))
    assert tokenizer.render("2+2?", True) == rendered
    assert tokenizer.render("2+2?", False) == plain
    assert tokenizer.turn_end == (None if turn_end is None else tokenizer.token_id(turn_end))
    assert tokenizer.turn_end is None or tokenizer.turn_end in tokenizer.stop_ids


@pytest.mark.parametrize("with_json", [True, False])
def test_mixtrals_pieces_keep_their_spaces(tmp_path: Path, with_json: bool) -> None:
    tokenizer = load_tokenizer(published.write_mixtral(tmp_path, with_json=with_json))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.render("2+2?", True) == "<s> [INST] 2+2? [/INST]"
    assert tokenizer.render("2+2?", False) == "<s>2+2?"
    assert tokenizer.encode("<s>") == [1] and (tokenizer.eos_id, tokenizer.turn_end) == (2, 2)
    if with_json:
        file = Backend.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode(TEXT) == file.encode(TEXT, add_special_tokens=False).ids


def test_qwen2_moe_is_read_from_its_vocabulary_and_merges(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(published.write_qwen2_moe(tmp_path))
    backend = published.byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    for text in (TEXT, "<|im_start|>user\nhow a<|im_end|>"):
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "T5Tokenizer"])
def test_a_class_that_does_not_read_the_vocabulary_is_named(tmp_path: Path, tokenizer_class: str) -> None:
    published.write_qwen2_moe(tmp_path, tokenizer_class)
    with pytest.raises(
        DataError, match=r"a \w+Tokenizer in which .* vocab.json says .* put the model's tokenizer.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer", "T5TokenizerFast", "BertTokenizer", "NoSuchClass", ""]
)
def test_the_class_that_is_named_beside_a_tokenizer_json_changes_nothing(tmp_path: Path, tokenizer_class: str) -> None:
    published.write(tmp_path, "Qwen3")
    expected = load_tokenizer(tmp_path).encode(TEXT)
    published.change(tmp_path / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == expected and tokenizer.decode(expected) == TEXT


def test_moonlights_remote_code_is_not_run_and_the_file_that_helps_is_named(tmp_path: Path) -> None:
    published.write_moonlight(tmp_path)
    said = (
        r"tiktoken\.model is a tiktoken vocabulary .*TikTokenTokenizer.* never run here: put a tokenizer\.json beside"
    )
    with pytest.raises(DataError, match=said):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"tiktoken\.model is a tiktoken vocabulary .* put a tokenizer\.json beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").rename(tmp_path / "vocabulary.model")
    with pytest.raises(DataError, match=r"vocabulary\.model is a tiktoken vocabulary"):
        load_tokenizer(tmp_path)


def test_moonlight_with_a_tokenizer_json_works_beside_its_remote_code(tmp_path: Path) -> None:
    published.write_moonlight(tmp_path)
    published.byte_level(("[EOS]", "[BOS]", "<|im_end|>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_id == tokenizer.token_id("[EOS]") == 263


def test_any_tokenizer_of_remote_code_is_refused_without_a_tokenizer_json(tmp_path: Path) -> None:
    published.write_qwen2_moe(tmp_path)
    (tmp_path / "odd.py").write_text("raise SystemExit('remote code was run')\n")
    auto = {"AutoTokenizer": ["odd.OddTokenizer", None]}
    published.change(tmp_path / "tokenizer_config.json", auto_map=auto, tokenizer_class="OddTokenizer")
    with pytest.raises(
        DataError, match=r"no tokenizer\.json, and odd\.OddTokenizer is code of the directory; .* never"
    ):
        load_tokenizer(tmp_path)


def test_tokenizers_that_honestly_do_not_give_text_back_are_taken(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "tom", "2", "<eos>"])}, "[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    published.configure(tmp_path, "Qwen3MoeForCausalLM", 3)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Tom 2 apples") == [1, 2, 0]
    assert tokenizer.decode([1, 2]) == "tom 2"


def test_a_text_is_not_cut_at_the_length_that_tokenizer_json_names(tmp_path: Path) -> None:
    published.write(tmp_path, "Qwen3")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT and len(tokenizer.encode("2")) == 1


def test_settings_that_change_what_tokenizer_json_encodes_are_refused(tmp_path: Path) -> None:
    published.write(tmp_path, "Qwen3")
    published.change(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(DataError, match=r"has not the tokens of tokenizer\.json .* remove from tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2-MoE without tokenizer.json"])
def test_a_token_of_added_tokens_json_that_is_not_read_is_refused(tmp_path: Path, name: str) -> None:
    written = published.write(tmp_path, name) if name == "Qwen3" else published.write_qwen2_moe(tmp_path)
    known = load_tokenizer(written).token_id("<|im_end|>")
    published.dump(tmp_path / "added_tokens.json", {"<|im_end|>": known})
    load_tokenizer(tmp_path)
    published.dump(tmp_path / "added_tokens.json", {"<|im_end|>": known, "<|call|>": 310})
    with pytest.raises(
        DataError, match=r"added_tokens\.json says that '<\|call\|>' is 310, and in the tokenizer it is"
    ):
        load_tokenizer(tmp_path)


def test_an_end_token_that_tokenizer_json_does_not_have_is_refused(tmp_path: Path) -> None:
    published.write(tmp_path, "Qwen3")
    published.change(tmp_path / "tokenizer_config.json", eos_token="<|eot_id|>")
    with pytest.raises(DataError, match=r"eos_token = '<\|eot_id\|>' .* is no token of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_template_file_beside_a_lone_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    published.write_mixtral(tmp_path, with_json=False)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text(published.MIXTRAL)
    with pytest.raises(DataError, match=r"chat_template\.jinja beside a lone \.model is read by nothing"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral"])
def test_the_texts_of_single_tokens_add_up_to_the_whole_text(tmp_path: Path, name: str) -> None:
    written = published.write_mixtral(tmp_path) if name == "Mixtral" else published.write(tmp_path, name)
    tokenizer = load_tokenizer(written)
    text = "Tom has 2 apples.\n\nHow  many are left? "
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special=False) and len(texts) == len(ids)
    assert texts[-1] == tokenizer.decode([tokenizer.eos_id], skip_special=False)
    parts = token_texts(tokenizer, tokenizer.encode("\u00e9 x"))  # two bytes of one character, then a space
    assert parts[-1].strip() == "x" and "".join(parts).endswith(" x")


def test_the_class_of_a_distilled_model_no_longer_costs_its_spaces(tmp_path: Path) -> None:
    """transformers itself loses them, so that the test would notice its change of mind."""
    from transformers import AutoTokenizer

    published.write(tmp_path, "Qwen3 distilled")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert " " not in theirs.decode(theirs.encode("Tom has 2", add_special_tokens=False))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode("Tom has 2")) == "Tom has 2"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizerFast"
