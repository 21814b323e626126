"""What a tokenizer makes of a prompt, and where a turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_gspo.data.huggingface import TEMPLATE_FILE
from megatron_gspo.data.model_files import read_json
from megatron_gspo.data.tokenizer import Tokenizer, token_texts, turn_end_fix, turn_end_problem
from megatron_gspo.doctor.check import Check, ok, warning
from megatron_gspo.types import Prompt

END = "\u00a6"
"""Stands at the end of each token that is shown."""
FIRST, LAST = 40, 30
"""Tokens of a long prompt that are shown, from its beginning and its end."""


def check_turn_end(tokenizer: Tokenizer, chat_template: bool) -> list[Check]:
    """Whether responses stop where the chat template ends a turn; nothing to say when it is not used."""
    if not chat_template or tokenizer.turn_end is None:
        return []
    problem = turn_end_problem(tokenizer)
    if problem:
        return [warning(problem, turn_end_fix(tokenizer))]
    end = tokenizer.decode([tokenizer.turn_end], skip_special=False)
    return [ok(f"the chat template ends a turn with {end!r} ({tokenizer.turn_end}), a stop token")]


def check_template_files(directory: Path, chat_template: bool) -> list[Check]:
    """Whether two files hold templates that differ: transformers reads one of them, and says nothing of the other."""
    beside, name = directory / TEMPLATE_FILE, "tokenizer_config.json"
    other = read_json(directory, name).get("chat_template") if beside.is_file() and chat_template else None
    if not isinstance(other, str) or other.strip() == beside.read_text(encoding="utf-8").strip():
        return []
    return [warning(f"{beside} is the chat template, and the other one in {name} is read by nothing", "remove one")]


def show_prompt(tokenizer: Tokenizer, prompt: Prompt) -> Check:
    """One line: the prompt as the model reads it."""
    count = len(prompt.token_ids)
    return ok(
        f"prompt {prompt.id!r} as the model reads it, {count} tokens, each before a {END}: "
        f"{show_tokens(tokenizer, prompt.token_ids)}"
    )


def show_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The tokens' texts, each with ``END`` behind it; control characters escaped, spaces as U+2423, a long one cut."""
    if len(ids) <= FIRST + LAST:
        return _shown(tokenizer, ids)
    cut = len(ids) - FIRST - LAST
    return f"{_shown(tokenizer, ids[:FIRST])} ... {cut} tokens ... {_shown(tokenizer, ids[-LAST:])}"


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    texts = token_texts(tokenizer, ids)
    shown = []
    start = 0
    while start < len(ids):
        stop = start + 1
        while "\ufffd" in texts[start] and stop < len(ids) and "\ufffd" in texts[stop]:
            stop += 1  # tokens that are parts of a character make sense together only
        text = texts[start] if stop == start + 1 else tokenizer.decode(ids[start:stop], skip_special=False)
        shown.append(_escaped(text) + END)
        start = stop
    return "".join(shown)


def _escaped(text: str) -> str:
    plain = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(plain).replace(" ", "\u2423")
