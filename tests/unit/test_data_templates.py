"""Rendered prompts: what messages say is in the text, and where a turn ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gspo.data import load_completions, load_prompts, load_tokenizer
from megatron_gspo.data.tokenizer import Tokenizer, response_text, training_end, turn_end_problem
from megatron_gspo.errors import DataError
from tests.unit import published

Open = Callable[..., Tokenizer]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """A family's tokenizer, with another template or other settings of its tokenizer_config.json."""

    def open_one(name: str = "Qwen3", *, template: Any = "", eos: str = "", **settings: Any) -> Tokenizer:
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        published.write(directory, name)
        config = directory / "tokenizer_config.json"
        if template:
            published.change(config, chat_template=template)
        if eos:
            published.change(config, eos_token=eos)
            end = published.byte_level(published.FAMILIES[name].special).token_to_id(eos)
            published.change(directory / "config.json", eos_token_id=end)
            (directory / "generation_config.json").unlink()
        return load_tokenizer(directory, **settings)

    return open_one


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def test_every_message_of_a_conversation_is_in_the_text_in_order(opened: Open) -> None:
    chat = [{"role": "system", "content": "Be brief."}, user("6x7?"), said("<think>easy</think>\n42"), user("Sure?")]
    assert opened().render(chat, True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6x7?<|im_end|>\n"
        "<|im_start|>assistant\n42<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content[:20] if loop.first else m.content }}{% endfor %}",
    ],
    ids=["knows no system", "the last message alone", "cut short"],
)
def test_a_template_that_leaves_out_what_a_message_says_is_refused_with_the_message(
    opened: Open, template: str
) -> None:
    chat = [{"role": "system", "content": "Answer with a number, and nothing else."}, user("6x7?")]
    with pytest.raises(DataError, match=r"leaves out what message 0 \(system\) says, 'Answer with a number"):
        opened(template=template).render(chat, True)


def test_a_short_message_that_is_left_out_is_noticed_although_its_text_occurs_elsewhere(opened: Open) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"leaves out what message 0 \(developer\) says, 'u'"):
        opened(template=template).render([{"role": "developer", "content": "u"}, user("6x7?")], True)


def test_a_template_may_trim_escape_and_drop_earlier_thinking(opened: Open) -> None:
    trims = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert opened(template=trims).render([user("  6x7?\n")], True) == "[6x7?]"
    escapes = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    assert opened(template=escapes).render([user('a "b"\n\u00e9')], True) == '"a \\"b\\"\\n\u00e9"'
    thinking = [user("x"), said("<think>\nlong\n</think>"), user("y")]
    assert "long" not in opened().render(thinking, True)


def test_a_turn_that_only_calls_tools_is_written_as_its_template_wants_it(opened: Open) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    chat = [user("2+2?"), said(None, tool_calls=[call]), {"role": "tool", "content": "4"}]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>' in opened().render(chat, True)
    assert "<tool_call>add</tool_call>" in opened("GLM-4.5").render(chat, True)
    assert "None" not in opened("GLM-4.5").render(chat, True)
    # one turn, not an empty one besides
    assert opened("DeepSeek-V3").render(chat, True).count("<\uff5cAssistant\uff5c>") == 2
    with pytest.raises(DataError, match=r"leaves out the call of 'add' in message 1"):
        opened(template="{% for m in messages %}{{ m.content or '' }}{% endfor %}").render(chat, True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Qwen3", "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
        ("Qwen3", "2+2?<|im_end|>"),
        ("DeepSeek-V3", f"{published.BOS}2+2?"),
        ("GLM-4.5", "<|user|>\n2+2?"),
    ],
)
def test_a_text_that_is_rendered_already_is_not_rendered_again(opened: Open, name: str, text: str) -> None:
    tokenizer = opened(name)
    with pytest.raises(DataError, match=r"already holds '<.*', which the chat template writes itself.*= false"):
        tokenizer.render(text, True)
    assert tokenizer.render(text, False).count("2+2?") == 1
    with pytest.raises(DataError, match=r"message 1 \(user\) holds '<.*', which the chat template writes"):
        tokenizer.render([{"role": "system", "content": "x"}, user(text)], True)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>"),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>", "<|begin_of_text|>"),
        ("<s>[INST] 2+2? [/INST]", "[INST]"),
        ("<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n", "<start_of_turn>"),
        ("<\uff5cUser\uff5c>2+2?<\uff5cAssistant\uff5c>", "<\uff5cUser\uff5c>"),
        ("<|user|>\n2+2?<|end|>\n<|assistant|>", "<|user|>"),
    ],
)
def test_a_text_that_another_models_template_has_rendered_is_refused(opened: Open, text: str, mark: str) -> None:
    tokenizer = opened(template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    with pytest.raises(DataError) as caught:
        tokenizer.render(text, True)
    assert f"begins with {mark!r}: another model's chat template has rendered it already" in str(caught.value)
    assert tokenizer.render(text, False) == text
    asked = f"What does {mark} mean?"
    assert tokenizer.render(asked, True) == f"<user>{asked}<assistant>"


def test_a_token_that_ends_texts_is_refused_within_a_prompt_although_no_template_writes_it(opened: Open) -> None:
    tokenizer = opened()  # its template writes <|im_end|>, and <|endoftext|> is the padding
    with pytest.raises(
        DataError, match=r"the prompt holds '<\|endoftext\|>', which the model would read as that token"
    ):
        tokenizer.render("one <|endoftext|> two", True)
    with pytest.raises(DataError, match=r"message 0 \(user\) holds '<\|endoftext\|>', a token that ends texts"):
        tokenizer.render([user("one <|endoftext|> two")], True)
    assert tokenizer.render("one <|endoftext|> two", False) == "one <|endoftext|> two"


def test_templates_of_which_none_is_the_default_and_one_in_an_unread_file_are_refused(tmp_path: Path) -> None:
    published.write(tmp_path, "Qwen3")
    config = tmp_path / "tokenizer_config.json"
    published.change(config, chat_template=[{"name": "rag", "template": PLAIN}, {"name": "tools", "template": PLAIN}])
    for variables in ({}, {"enable_thinking": False}):
        with pytest.raises(DataError, match=r"the chat template cannot be chosen: .*no default"):
            load_tokenizer(tmp_path, template_variables=variables)
    published.change(config, chat_template=[{"name": "default", "template": PLAIN}, {"name": "rag", "template": "x"}])
    assert load_tokenizer(tmp_path).render("2+2?", True) == "<|user|>2+2?<|assistant|>"
    published.change(config, chat_template=None)
    published.dump(tmp_path / "chat_template.json", {"chat_template": PLAIN})
    with pytest.raises(DataError, match=r"chat_template\.json is read by nothing"):
        load_tokenizer(tmp_path)


def test_a_rendered_text_without_special_tokens_is_known_by_both_its_ends(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(published.write_mixtral(tmp_path))
    with pytest.raises(DataError, match="the prompt already holds"):
        tokenizer.render("<s> [INST] 2+2? [/INST]", True)
    published.change(tmp_path / "tokenizer_config.json", chat_template=PLAIN)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"already holds '<\|user\|>'"):
        tokenizer.render("<|user|>2+2?<|assistant|>", True)
    assert tokenizer.render("<|user|> is a token", True) == "<|user|><|user|> is a token<|assistant|>"


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Mixtral"])
def test_a_prompt_begins_with_one_begin_of_sequence_token(tmp_path: Path, name: str) -> None:
    written = published.write_mixtral(tmp_path) if name == "Mixtral" else published.write(tmp_path, name)
    tokenizer = load_tokenizer(written)
    bos = tokenizer.render("", False)
    (begin,) = tokenizer.encode(bos)
    for text in (tokenizer.render("hi", False), tokenizer.render(f"{bos}hi", False), tokenizer.render("hi", True)):
        assert tokenizer.encode(text).count(begin) == 1 and text.startswith(bos)
    with pytest.raises(DataError, match="begins with two begin-of-sequence tokens"):
        tokenizer.render(bos + bos + "hi", False)


def test_a_template_that_writes_the_begin_token_twice_is_refused(opened: Open) -> None:
    with pytest.raises(DataError, match="two begin-of-sequence tokens"):
        opened("DeepSeek-V3", template="{{ bos_token }}{{ bos_token }}{{ messages[0].content }}").render("hi", True)


# ------------------------------------------------------------------------------------------------ the end of a turn


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (published.QWEN3, "<|im_end|>"),
        (published.QWEN2, "<|im_end|>"),
        (published.QWEN2.replace("{% if add_generation_prompt %}", "{% if true %}"), "<|im_end|>"),
        (PLAIN, None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}<|im_start|>assistant", None),
        ("{{ raise_exception('one message only') if messages|length > 1 else messages[0].content }}", None),
        ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", "<|endoftext|>"),
    ],
    ids=["Qwen3", "Qwen2", "always asks", "writes no end", "an answer's beginning is no end", "refuses", "eos_token"],
)
def test_the_end_of_a_turn_is_the_special_token_behind_what_the_assistant_says(
    opened: Open, template: str, end: str | None
) -> None:
    tokenizer = opened(template=template, eos="<|endoftext|>")
    assert tokenizer.turn_end == (None if end is None else tokenizer.token_id(end))


def test_a_base_model_does_not_stop_where_its_template_ends_a_turn_until_it_is_told(opened: Open) -> None:
    tokenizer = opened(eos="<|endoftext|>")
    assert (tokenizer.eos_id, tokenizer.turn_end, tokenizer.stop_ids) == (263, 265, (263,))
    assert "ends a turn with '<|im_end|>' (265), but responses stop only at '<|endoftext|>' (263)" in turn_end_problem(
        tokenizer
    )
    for tokens in (["<|im_end|>"], [265], [265, "<|im_end|>"]):
        told = opened(eos="<|endoftext|>", stop_tokens=tokens)
        assert told.stop_ids == (263, 265) and told.eos_id == 263 and turn_end_problem(told) == ""


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<|eot|>", r"rollout\.stop_tokens: '<\|eot\|>' is not one token"),
        ("the end", "is not one token of the model's vocabulary"),
        (320, "320 is outside the vocabulary of 320"),
    ],
)
def test_a_stop_token_that_is_not_one_token_is_refused(opened: Open, token: str | int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(stop_tokens=[token])


def test_a_stop_token_may_be_any_token_by_its_text(opened: Open) -> None:
    tokenizer = opened(stop_tokens=["\n\n", " how", "</think>"])
    assert {tokenizer.decode([i], skip_special=False) for i in tokenizer.stop_ids} == {
        *("\n\n", " how", "</think>", "<|im_end|>", "<|endoftext|>")
    }


def test_fine_tuning_teaches_the_token_at_which_rollouts_stop(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompt": "2+2?", "completion": "4"}) + "\n")
    base = opened(eos="<|endoftext|>")
    with pytest.raises(DataError, match=r"taught to end there: set rollout\.stop_tokens = \[\"<\|im_end\|>\"\]"):
        load_completions(path, tokenizer=base)
    told = opened(eos="<|endoftext|>", stop_tokens=["<|im_end|>"])
    assert load_completions(path, tokenizer=told).completions[0].completion_ids == (*told.encode("4"), 265)
    # without a template the model's own end of sequence is the end
    plain = load_completions(path, tokenizer=base, chat_template=False).completions[0]
    assert plain.completion_ids == (*base.encode("4"), 263) and training_end(base, False) == 263
    for end in ("<|im_end|>", "<|endoftext|>"):  # an end that the file has is not doubled
        path.write_text(json.dumps({"prompt": "2+2?", "completion": f"4{end}"}) + "\n")
        ids = load_completions(path, tokenizer=told).completions[0].completion_ids
        assert ids == (*told.encode("4"), told.token_id(end))


def test_rewards_read_special_tokens_when_they_ask_for_them_but_never_the_stop_token(opened: Open) -> None:
    tokenizer = opened("GLM-4.5", stop_tokens=["</think>"])
    ids = tokenizer.encode("<sop>4</think>2<|user|>")
    assert response_text(tokenizer, special_tokens=False)(ids) == "4</think>2"
    assert response_text(tokenizer, special_tokens=True)(ids) == "<sop>4</think>2"
    cut = ids[:-1]
    assert response_text(tokenizer, special_tokens=True)(cut) == "<sop>4</think>2"
    assert response_text(tokenizer, special_tokens=False)(ids[:3]) == "4"  # a stop token that is plain text
    assert response_text(tokenizer, special_tokens=True)([]) == ""


# ------------------------------------------------------------------------------------------- the template's variables


def test_variables_reach_the_template(opened: Open) -> None:
    without = opened().render("2+2?", True)
    assert opened(template_variables={"enable_thinking": True}).render("2+2?", True) == without
    off = opened(template_variables={"enable_thinking": False})
    assert off.render("2+2?", True) == without + "<think>\n\n</think>\n\n"
    assert off.render([user("2+2?")], True) == off.render("2+2?", True)


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "add_generation_prompt", "max_length"])
def test_a_variable_that_the_template_never_reads_is_refused(opened: Open, name: str) -> None:
    with pytest.raises(DataError, match=rf"never reads {name} \(it reads .*enable_thinking\)"):
        opened(template_variables={name: False})


def test_variables_without_a_template_are_refused(tmp_path: Path) -> None:
    published.write(tmp_path, "Qwen3")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    published.dump(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(DataError, match="chat_template_kwargs is set, but the tokenizer has no chat template"):
        load_tokenizer(tmp_path, template_variables={"enable_thinking": False})


# ------------------------------------------------------------------------------------------------------- from a file


def test_a_row_that_would_not_reach_the_model_is_named_by_file_and_line(opened: Open, tmp_path: Path) -> None:
    tokenizer = opened()
    for prompt, problem in {
        "<|im_start|>user\nhi<|im_end|>": "the prompt already holds '<|im_start|>'",
        "[]": "",
    }.items():
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps({"prompt": prompt}) + "\n")
        if problem:
            with pytest.raises(DataError) as caught:
                load_prompts(path, tokenizer=tokenizer)
            assert str(caught.value).startswith(f"{path}, line 2: {problem}")
            assert load_prompts(path, tokenizer=tokenizer, skip_bad=True).skipped == 1
        else:
            assert len(load_prompts(path, tokenizer=tokenizer)) == 2


def test_messages_of_parquet_render_as_those_of_jsonl(opened: Open, tmp_path: Path) -> None:
    asks = "{% for m in messages %}{% if 'tool_calls' in m %}CALL{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.string()))])
    rows = [{"prompt": [user("2+2?")]}]
    table = pa.Table.from_pylist(rows, schema=pa.schema([("prompt", pa.list_(message))]))
    pq.write_table(table, tmp_path / "p.parquet")
    (prompt,) = load_prompts(tmp_path / "p.parquet", tokenizer=opened(template=asks)).prompts
    assert prompt.text == "2+2?"


def test_several_templates_without_a_default_are_one_line(opened: Open) -> None:
    named = [{"name": "one", "template": PLAIN}, {"name": "two", "template": PLAIN}]
    with pytest.raises(DataError, match=r"the chat template cannot be chosen: .*multiple chat templates"):
        opened(template=named).render("hi", True)
    named[1]["name"] = "default"
    assert opened(template=named).render("hi", True) == "<|user|>hi<|assistant|>"
