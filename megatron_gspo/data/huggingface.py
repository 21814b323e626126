"""A tokenizer that transformers loads, held against its own ``tokenizer.json``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gspo.data.messages import ChatMessage
from megatron_gspo.data.model_files import find_stop_ids, one_line, read_json, short, softmax_rows
from megatron_gspo.data.templates import ChatTemplate
from megatron_gspo.errors import DataError
from megatron_gspo.untrusted import read_bytes

FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
PROBES = (
    "Tom has 2 apples.\nHow  many are left, 1,234.5?\n",
    "\tdef f(x):\n\n    return x ** 2  # it's\r\n",
    "na\u00efve Gr\u00f6\u00dfe, \u041f\u0440\u0438\u0432\u0435\u0442 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u6771\u4eac\u306f 3 \u3064\u3002 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 e\u0301 \u00bd \U0001f642",
)
"""Texts whose tokens and decoded form must be those of ``tokenizer.json``: white space, digits, scripts."""
JSON_FILES = (
    *(FILE, "tokenizer_config.json", "config.json", "generation_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
"""What transformers and this package read of a directory: each must mean one thing to both."""
SPECIALS = 512
"""Special tokens of a tokenizer that are tried; some have thousands that nothing uses."""


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads.

    Where there is a ``tokenizer.json``, that file is the tokenizer: the class that ``tokenizer_config.json`` names is
    not used, since transformers builds many a class anew from the vocabulary alone, with other rules for spaces.
    """

    def __init__(self, directory: Path, template_variables: Mapping[str, Any] | None = None) -> None:
        for name in JSON_FILES:
            read_json(directory, name)
        self._hf = _load(directory)
        settings = read_json(directory, "tokenizer_config.json")
        _check_named_once(directory, settings)
        if (directory / FILE).is_file():
            _check_against_file(self._hf, directory, settings)
        else:
            _check_vocabulary(self._hf, directory, settings)
        self._begin = _begin(self._hf, self.encode, settings)
        beside = directory / TEMPLATE_FILE
        template_file = beside if beside.is_file() else directory / "tokenizer_config.json"
        self._template = None
        if self._hf.chat_template:
            self._template = ChatTemplate(self._hf, template_variables or {}, template_file)
        if self._template is None and (directory / "chat_template.json").is_file():
            raise DataError(
                f"{directory}: chat_template.json is read by nothing: write its text to chat_template.jinja"
            )
        if template_variables and self._template is None:
            raise DataError(f"{directory}: data.chat_template_kwargs is set, but the tokenizer has no chat template")
        self.vocab_size = softmax_rows(directory) or len(self._hf)
        self.eos_id, self.stop_ids = find_stop_ids(directory, self._hf.eos_token_id)

    def __len__(self) -> int:
        return max(self._hf.get_vocab().values(), default=-1) + 1

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of it."""
        return max(map(len, self._hf.get_vocab()), default=1)  # of bytes, an entry has a character each

    @property
    def turn_end(self) -> int | None:
        """The token that ends a turn of the template."""
        token = self._template.turn_end if self._template else None
        return None if token is None else self.token_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        try:
            return list(self._hf.encode(text, add_special_tokens=False))
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise DataError(f"the tokenizer cannot encode {short(text)}: {one_line(error)}") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self._hf.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def token_id(self, text: str) -> int | None:
        """Of a token; None where there is none."""
        entry = self._hf.get_vocab().get(text)
        if entry is not None:
            return int(entry)
        try:
            ids = self.encode(text)
        except DataError:
            return None
        return ids[0] if len(ids) == 1 and ids[0] != self._hf.unk_token_id else None

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        """Chat messages by the template."""
        if isinstance(prompt, str) and not (use_chat_template and self._template):
            text = prompt if prompt.startswith(self._begin) else self._begin + prompt
        elif not use_chat_template:
            raise DataError("the prompt is chat messages, which need data.chat_template = true")
        elif self._template is None:
            raise DataError("the prompt is chat messages, but the tokenizer has no chat template")
        else:
            text = self._template.render(prompt)
        bos = self._hf.bos_token
        if bos and text.startswith(bos + bos):
            raise DataError(f"the prompt begins with two begin-of-sequence tokens, {bos + bos!r}: remove one")
        return text

    def sample_words(self, count: int = 32) -> str:
        """Plain words of the vocabulary, a space between them."""
        ids = sorted(self._hf.get_vocab().values())
        words = (self.decode([i]).strip() for i in ids)
        return " ".join(itertools.islice((word for word in words if word.isascii() and word.isalnum()), count))


def _load(directory: Path) -> Any:
    """The tokenizer of transformers, which runs no code that the directory brings along."""
    try:
        if (directory / FILE).is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise whatever their file formats raise
        raise DataError(f"{directory}: transformers cannot load the tokenizer: {one_line(error)}") from error


def _check_against_file(hf: Any, directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises DataError unless texts have the tokens of ``tokenizer.json`` and become the same texts again.

    Whether a text survives is not asked: a tokenizer may be of lower case, or of ten digits.
    """
    from tokenizers import Tokenizer as Backend

    file = Backend.from_file(str(directory / FILE))
    file.no_truncation()
    file.no_padding()
    named = _added(settings)
    _check_added_tokens(hf, directory)
    built = hf.get_vocab()
    for token, i in named.items():
        if built.get(token) != i:
            raise DataError(
                f"{directory}: tokenizer_config.json says that {short(token)} is {i}, and in the tokenizer it is "
                f"{built.get(token)}: mend added_tokens_decoder, or add the token to {FILE}"
            )
    for name in ("eos_token", "bos_token"):
        token = getattr(hf, name)
        if token is not None and file.token_to_id(token) is None and token not in named:
            raise DataError(
                f"{directory}: {name} = {token!r} of tokenizer_config.json is no token of {FILE}: write the one that "
                f"the model knows"
            )
    for text in _probes(file):
        ids = _outcome(lambda: file.encode(text, add_special_tokens=False).ids)  # noqa: B023  called at once
        got = _outcome(lambda: hf.encode(text, add_special_tokens=False))  # noqa: B023
        if ids == got and (ids is None or all(_decoded(file, hf, ids, skip) for skip in (True, False))):
            continue
        raise DataError(
            f"{directory}: with tokenizer_config.json, {short(text)} has not the tokens of {FILE} (there "
            f"{str(ids)[:60]}, with it {str(got)[:60]}): remove from tokenizer_config.json what changes them "
            f"(split_special_tokens, added_tokens_decoder), or save both files anew with save_pretrained"
        )


def _check_vocabulary(hf: Any, directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises DataError unless what was built without a ``tokenizer.json`` has the ids of the other files."""
    _check_added_tokens(hf, directory)
    built = hf.get_vocab()
    for name, ids in (("vocab.json", read_json(directory, "vocab.json")), ("tokenizer_config.json", _added(settings))):
        for token, i in ids.items():
            if built.get(token) != i:
                raise DataError(
                    f"{directory}: transformers builds a {type(hf).__name__} in which {short(token)} is "
                    f"{built.get(token)}, and {name} says {i}: name the right tokenizer_class in "
                    f"tokenizer_config.json, or put the model's tokenizer.json beside it"
                )


def _check_named_once(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raises DataError for two files that say different things: transformers takes ``special_tokens_map.json``'s
    tokens, but where ``added_tokens_decoder`` is given, as in most directories (then it does not read that file, and a
    stale one is harmless); the last of several templates of one name; and a template's mark of its encoding for
    text."""
    read = "added_tokens_decoder" not in settings
    for name, other in read_json(directory, "special_tokens_map.json").items() if read else ():
        mine, theirs = _content(settings.get(name)), _content(other)
        if name in ("bos_token", "eos_token") and None not in (mine, theirs) and mine != theirs:
            raise DataError(
                f"{directory}: {name} is {mine!r:.60} in tokenizer_config.json and {theirs!r:.60} in "
                f"special_tokens_map.json: remove the one that is wrong"
            )
    templates = settings.get("chat_template")
    names = [str(one.get("name")) for one in templates if isinstance(one, dict)] if isinstance(templates, list) else []
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{directory}: tokenizer_config.json has the chat template {twice!r:.60} twice: remove one")
    path = directory / TEMPLATE_FILE
    if path.is_file() and read_bytes(path).startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{path}: it begins with a byte order mark, which the model would read: save it without one")


def _content(token: Any) -> Any:
    """The text of a special token, which may be written with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _check_added_tokens(hf: Any, directory: Path) -> None:
    """Raises DataError for a token of ``added_tokens.json`` that was not read: it would be encoded as plain text."""
    built = hf.get_vocab()
    for token, i in read_json(directory, "added_tokens.json").items():
        if built.get(token) != i:
            raise DataError(
                f"{directory}: added_tokens.json says that {short(token)} is {i}, and in the tokenizer it is "
                f"{built.get(token)}: add it to {FILE} and to added_tokens_decoder of tokenizer_config.json, or remove "
                f"it there if the model does not use it"
            )


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens that ``tokenizer_config.json`` names: text -> id."""
    added = settings.get("added_tokens_decoder")
    entries = added.items() if isinstance(added, dict) else ()
    return {str(token["content"]): int(i) for i, token in entries if isinstance(token, dict) and "content" in token}


def _probes(file: Any) -> Iterator[str]:
    yield from PROBES
    vocabulary = sorted(file.get_vocab(with_added_tokens=False).values())
    yield " ".join(file.decode([i]) for i in itertools.islice(vocabulary, 64))
    for token in itertools.islice(file.get_added_tokens_decoder().values(), SPECIALS):
        yield f" 1{token.content} 2 {token.content}\n3"


def _outcome(encode: Callable[[], list[int]]) -> list[int] | None:
    """Token ids; None for a text that cannot be encoded."""
    try:
        return list(encode())
    except Exception:  # the Rust tokenizers raise bare Exception
        return None


def _decoded(file: Any, hf: Any, ids: list[int], skip: bool) -> bool:
    text = hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return bool(text == file.decode(ids, skip_special_tokens=skip))


def _begin(hf: Any, encode: Callable[[str], list[int]], settings: Mapping[str, Any]) -> str:
    """The special tokens that the tokenizer puts in front of a text; they are put there as text that one can see.

    transformers 5 ignores ``add_bos_token`` beside a ``tokenizer.json``, and DeepSeek-V3 asks for its token only so.
    """
    asked = str(hf.bos_token) if settings.get("add_bos_token") is True and hf.bos_token else ""
    if not hf.encode(""):
        return asked
    for text in ("a", "0", *(hf.decode([i]) for i in range(min(len(hf), 64)))):
        ids = _outcome(functools.partial(encode, text))
        if ids:
            whole = list(hf.encode(text))
            front = next((n for n in range(len(whole)) if whole[n : n + len(ids)] == ids), 0)
            return "".join(hf.convert_ids_to_tokens(whole[:front])) or asked
    return asked
