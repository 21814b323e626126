"""Tokenizers of a model directory, Hugging Face's and SentencePiece's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_gspo.data import load_tokenizer
from megatron_gspo.errors import DataError
from megatron_gspo.hf.checkpoint import copy_companions

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"


def config(directory: Path, name: str = "config.json", **settings: Any) -> None:
    (directory / name).write_text(json.dumps({"model_type": "qwen3_moe", **settings}))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Words "0" ... "9", "[user]", "[assistant]", then <eos> = 12, <end> = 13, <bos> = 14."""
    words = [*"0123456789", "[user]", "[assistant]", "<eos>", "<end>", "<bos>"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    config(tmp_path, vocab_size=16)
    return tmp_path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Natalia sold 48 clips in April, and then half as many in May."] * 3),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=-1,
        unk_id=0,
        eos_id=1,
        minloglevel=2,
    )
    config(directory, vocab_size=300)
    return directory


def test_text_makes_a_round_trip_and_special_tokens_can_be_shown(hf: Path) -> None:
    tokenizer = load_tokenizer(hf)
    assert tokenizer.encode("4 2 <eos>") == [4, 2, 12]
    assert tokenizer.decode([4, 2, 12]) == "4 2"
    assert tokenizer.decode([4, 2, 12], skip_special=False) == "4 2 <eos>"


def test_stop_ids_are_the_union_of_three_places(hf: Path) -> None:
    assert load_tokenizer(hf).stop_ids == (12,)
    config(hf, vocab_size=16, eos_token_id=14)
    config(hf, "generation_config.json", eos_token_id=[13, 12])
    tokenizer = load_tokenizer(hf)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (12, (12, 13, 14))


def test_the_softmax_may_be_wider_than_the_tokenizer_but_not_narrower(hf: Path) -> None:
    tokenizer = load_tokenizer(hf)
    assert (tokenizer.vocab_size, len(tokenizer)) == (16, 15)
    config(hf, vocab_size=14)
    with pytest.raises(DataError, match=r"highest id is 14, but config.vocab_size = 14"):
        load_tokenizer(hf)


def test_a_stop_id_outside_the_vocabulary_is_refused(hf: Path) -> None:
    config(hf, vocab_size=16, eos_token_id=16)
    with pytest.raises(DataError, match="stop token's highest id is 16"):
        load_tokenizer(hf)


def test_the_template_is_applied_when_asked_and_needed_by_messages(hf: Path) -> None:
    tokenizer = load_tokenizer(hf)
    chat = [{"role": "user", "content": "4 2"}]
    assert tokenizer.render("4 2", True) == tokenizer.render(chat, True) == "[user] 4 2 [assistant]"
    assert tokenizer.render("4 2", False) == "4 2"
    with pytest.raises(DataError, match=r"need data\.chat_template = true"):
        tokenizer.render(chat, False)


def test_messages_without_a_template_are_refused(hf: Path) -> None:
    (hf / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(hf)
    assert tokenizer.render("4 2", True) == "4 2"
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "4"}], True)


def test_a_tokenizer_that_puts_a_begin_token_shows_it_in_the_text(hf: Path) -> None:
    backend = Backend.from_file(str(hf / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 14)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>").save_pretrained(hf)
    tokenizer = load_tokenizer(hf)
    assert tokenizer.render("4 2", False) == "<bos>4 2"
    assert tokenizer.encode(tokenizer.render("4 2", False)) == [14, 4, 2]
    assert tokenizer.encode("4 2") == [4, 2]


def test_a_character_without_a_token_is_an_error(hf: Path) -> None:
    with pytest.raises(DataError, match="cannot encode '4 x'"):
        load_tokenizer(hf).encode("4 x")


TEXT = "  Natalia sold 48\n\nclips \u20ac in  May. "


def test_a_lone_sentencepiece_model_gives_text_back_exactly(pieces: Path) -> None:
    for path in (pieces, pieces / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
        assert tokenizer.decode([*ids, 1, *ids], skip_special=False) == f"{TEXT}</s>{TEXT}"
        assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (1, (1,), 300)


@pytest.fixture(scope="module")
def llama_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: a space in front of every text, bytes for what it has no piece for, and a symbol of the user's."""
    directory = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Natalia sold 48 clips in April, and then half as many in May."] * 3),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    config(directory, vocab_size=330)
    return directory


@pytest.mark.parametrize("text", ["Natalia", " Natalia", "  in  May ", "\u20ac \U0001f600\n\t", "sold<think>48", ""])
def test_leading_spaces_bytes_and_symbols_survive_a_model_that_puts_a_space_in_front(
    llama_pieces: Path, text: str
) -> None:
    tokenizer = load_tokenizer(llama_pieces)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama_pieces / "tokenizer.model"))
    assert ids == processor.encode(text)
    assert ("<think>" in text) == (processor.piece_to_id("<think>") in ids)
    assert tokenizer.decode([1, *ids, 2]) == text  # <s> and </s> are no text


def test_text_cannot_name_a_control_token(llama_pieces: Path) -> None:
    tokenizer = load_tokenizer(llama_pieces)
    assert tokenizer.eos_id == 2 and 2 not in tokenizer.encode("</s>")
    assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"


def test_a_guess_of_transformers_that_loses_spaces_is_refused_and_a_named_class_is_taken(
    llama_pieces: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama_pieces / "tokenizer.model").read_bytes())
    config(tmp_path, vocab_size=330)
    special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    with pytest.raises(DataError, match="transformers guesses a tokenizer that makes"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Natalia sold 48 clips")) == "Natalia sold 48 clips"
    assert tokenizer.encode("Natalia sold") == load_tokenizer(llama_pieces).encode("Natalia sold")


def test_a_saved_directory_carries_the_model_file(llama_pieces: Path, tmp_path: Path) -> None:
    copy_companions(llama_pieces, tmp_path)
    assert load_tokenizer(tmp_path).encode("in May") == load_tokenizer(llama_pieces).encode("in May")


def test_a_sentencepiece_model_has_no_chat_template(pieces: Path) -> None:
    assert load_tokenizer(pieces).render("hi", True) == "hi"
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(pieces).render([{"role": "user", "content": "hi"}], True)


def test_a_sentencepiece_model_wider_than_the_softmax_is_refused(pieces: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    config(tmp_path, vocab_size=299)
    with pytest.raises(DataError, match=r"highest id is 299, but config.vocab_size = 299"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"no tokenizer: expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="transformers cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_that_could_never_stop_is_refused(hf: Path) -> None:
    backend = Backend.from_file(str(hf / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(hf)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(hf)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "generation_config.json",
            {"eos_token_id": "</s>"},
            r"generation_config\.json: eos_token_id = '</s>' is not a",
        ),
        ("generation_config.json", {"eos_token_id": [12, None]}, r"eos_token_id = \[12, None\] is not a token's id"),
        ("config.json", {"vocab_size": "16"}, r"config\.json: vocab_size = '16' is not a number of tokens"),
        ("config.json", {"vocab_size": 16.0}, r"vocab_size = 16\.0 is not a number of tokens"),
        ("config.json", {"vocab_size": 0}, r"vocab_size = 0 is not a number of tokens"),
        (
            "special_tokens_map.json",
            {"eos_token": {"content": "<end>", "lstrip": False}},
            r"eos_token is '<eos>' in tokenizer_config\.json and '<end>' in special_tokens_map\.json: remove the one",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": {"content": "<tool>", "special": True}}},
            r"tokenizer_config\.json says that '<tool>' is 3, and in the tokenizer it is 15",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": "a"}, {"name": "default", "template": "b"}]},
            r"the chat template 'default' twice: remove one",
        ),
    ],
)
def test_files_that_say_two_things_or_nothing_usable_are_named(
    hf: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    path = hf / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(hf)
    assert "\n" not in str(caught.value)


def test_a_stale_map_of_special_tokens_is_no_error_where_transformers_does_not_read_it(hf: Path) -> None:
    """As in directories whose end of a turn was changed in tokenizer_config.json alone."""
    backend = Backend.from_file(str(hf / "tokenizer.json"))
    end = backend.token_to_id("<eos>")
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    added = {str(end): {"content": "<eos>", "special": True}}
    (hf / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    (hf / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>", "lstrip": False}}))
    tokenizer = load_tokenizer(hf)
    assert tokenizer.eos_id == end and tokenizer.stop_ids == (end,)


def test_an_error_that_names_a_key_alone_says_what_kind_it_is(hf: Path) -> None:
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot load the tokenizer: KeyError: 'added_tokens'"):
        load_tokenizer(hf)


def test_a_template_file_of_windows_editors_is_refused_since_its_mark_would_be_read(hf: Path) -> None:
    path = hf / "chat_template.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(DataError, match=r"chat_template\.jinja: it begins with a byte order mark"):
        load_tokenizer(hf)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "generation_config.json"])
def test_a_pointer_of_git_lfs_and_a_web_page_are_named_for_what_they_are(hf: Path, name: str) -> None:
    (hf / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11422654\n")
    if name == "tokenizer.model":
        (hf / "tokenizer.json").unlink()
        (hf / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=rf"{name}: it is a pointer of Git LFS, not the file: git lfs pull brings it"):
        load_tokenizer(hf)
    (hf / name).write_text("<!DOCTYPE html><html>Too many requests</html>")
    with pytest.raises(DataError, match=rf"{name}: it is a web page, not the file"):
        load_tokenizer(hf)
