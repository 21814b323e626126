"""Prompts in their one normal form, and what is refused because it would not reach the model."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gspo.data.messages import check_prompt
from megatron_gspo.errors import DataError


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def test_a_text_stays_as_it_is() -> None:
    assert check_prompt(" 1 + 1 =\n") == " 1 + 1 =\n"


def test_a_text_that_begins_as_a_list_is_a_text_and_empty_media_are_none() -> None:
    assert check_prompt('[{"id": 1}] How many?') == '[{"id": 1}] How many?'
    assert check_prompt([user("2+2?", images=[], audio=None)]) == (user("2+2?", images=[]),)
    assert check_prompt([user("2+2?", images=[{"bytes": None}])]) == (user("2+2?", images=[{}]),)


def test_parts_of_text_are_joined_with_nothing_between_them() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?", "image_url": None}]
    assert check_prompt([user(parts)]) == (user("What is 2+2?"),)


def test_keys_that_are_null_are_left_out_at_every_depth() -> None:
    call = {"id": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    messages = [
        user("2+2?", tool_calls=None, name=None),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_calls": []},
    ]
    assert check_prompt(messages) == (
        user("2+2?"),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "4"},
    )


@pytest.mark.parametrize(
    ("role", "read_as"),
    [
        *[("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"), ("bot", "assistant")],
        *[(role, role) for role in ("system", "developer", "tool")],
    ],
)
def test_well_known_names_of_roles_are_read(role: str, read_as: str) -> None:
    messages = check_prompt([{"role": role, "content": "x"}, user("y")])
    assert messages == ({"role": read_as, "content": "x"}, user("y"))


def test_messages_in_the_shape_of_sharegpt_are_read() -> None:
    assert check_prompt([{"from": "system", "value": "short"}, {"from": "human", "value": "2+2?"}]) == (
        {"role": "system", "content": "short"},
        user("2+2?"),
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the field 'prompt' is missing"),
        ("", "must be a non-empty string, got ''"),
        (" \n", r"must be a non-empty string, got ' \\n'"),
        (5, "must be a non-empty string, got 5"),
        ({"role": "user", "content": "x"}, "must be a non-empty string, got {"),
        ([], "prompt is an empty list"),
        ([None], r"prompt\[0\] = None is no chat message"),
        (["x"], r"prompt\[0\] = 'x' is no chat message"),
        ([user(None)], r"prompt\[0\] = .* needs role and content, which is not null"),
        ([{"content": "x"}], r"prompt\[0\] = .* needs role and content"),
        ([user(5)], r"prompt\[0\]: the content must be a text or text parts, got 5"),
        ([user(True)], "must be a text or text parts, got True"),
        ([user({"type": "text", "text": "x"})], "must be a text or text parts, got {"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "a part of the content is no text"),
        ([user([{"type": "image", "text": "a caption"}])], "a part of the content is no text"),
        ([user([{"type": "text", "text": None}])], "a part of the content is no text"),
        ([user(["x"])], "a part of the content is no text"),
        ([user("")], r"prompt\[0\]: the user's turn is empty, got ''"),
        ([user(" ")], "the user's turn is empty"),
        ([user("\u200b\ufeff")], "the user's turn is empty"),
        ("\u200b", "must be a non-empty string"),
        (
            '[{"content": "2+2?", "role": "user"}]',
            "'prompt' holds chat messages as a text, got .*: write them as a list",
        ),
        ("[{'role': 'user', 'content': '2+2?'}]", "holds chat messages as a text"),
        ([user("<image> what is this?", images=["cat.png"])], r"prompt\[0\] has 'images': images, audio and files do"),
        ([user([])], r"the user's turn is empty, got \[\]"),
        ([{"role": "critic", "content": "x"}], r"prompt\[0\]: the role 'critic' is unknown, use system"),
        ([{"role": 7, "content": "x"}], "the role 7 is unknown"),
        ([user("x"), {"role": "gpt", "content": "4"}], r"prompt\[1\], the last message, is the assistant's"),
        ([user("x"), {"role": "assistant", "content": None}, user("y")], r"prompt\[1\] = .* which is not null"),
    ],
)
def test_what_would_not_reach_the_model_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check_prompt(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_messages_nested_without_end_are_one_line() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(DataError, match="nested too deeply"):
        check_prompt([user("x", tool_calls=deep)])
