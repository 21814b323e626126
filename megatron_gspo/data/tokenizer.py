"""Tokenizers of a model directory: Hugging Face's own, or a lone SentencePiece ``.model``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_gspo.data.messages import ChatMessage
from megatron_gspo.errors import DataError, DependencyError

HF_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """Text to token ids and back, with the ids that end a response."""

    eos_id: int
    """The id that ends a training example; always one of ``stop_ids``."""
    stop_ids: tuple[int, ...]
    """Every id that ends a response, ascending: the union of ``generation_config.json``, ``config.json`` and the
    tokenizer. The engine is given all of them."""
    vocab_size: int
    """Rows of the model's softmax (``config.vocab_size``): every id lies below it. ``len()`` counts the tokenizer's
    own entries, which may be fewer."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of exactly this text; nothing is added in front or behind. Raises DataError."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        """The text that ``encode`` is given for a prompt.

        A text becomes a user's turn when ``use_chat_template`` is set and the tokenizer has a template; otherwise it
        stays as it is, after the begin-of-sequence token of a tokenizer that puts one there. Chat messages need the
        template: DataError without.
        """
        ...


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (nothing is downloaded), or of a SentencePiece ``.model`` file.

    A directory whose only tokenizer file is a ``.model`` is read by sentencepiece itself: transformers would guess a
    class from the architecture, and for Qwen3 the guess drops every space without a word. Where
    ``tokenizer_config.json`` makes it transformers' to read, the guess is compared with sentencepiece.
    Raises DataError when there is no tokenizer, no stop token, an id at or above ``config.vocab_size``, or such a guess
    that loses text.
    """
    path = Path(model_dir)
    if path.is_file() and path.suffix == ".model":
        return _checked(SentencePieceTokenizer(path, directory=path.parent), path)
    if not path.is_dir():
        raise DataError(f"{path}: no such model directory")
    models = sorted(path.glob("*.model"))
    if any((path / name).is_file() for name in HF_TOKENIZER_FILES):
        tokenizer = HuggingFaceTokenizer(path)
        if len(models) == 1 and not (path / "tokenizer.json").is_file():
            _check_guess(tokenizer, SentencePieceTokenizer(models[0], directory=path), path)
        return _checked(tokenizer, path)
    if len(models) == 1:
        return _checked(SentencePieceTokenizer(models[0], directory=path), path)
    found = ", ".join(model.name for model in models) or "none"
    raise DataError(
        f"{path}: no tokenizer: expected {' or '.join(HF_TOKENIZER_FILES[:2])}, or one SentencePiece .model "
        f"(found: {found})"
    )


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the loaders raise whatever their file formats raise
            raise DataError(f"{directory}: transformers cannot load the tokenizer: {_one_line(error)}") from error
        # A tokenizer that puts a begin-of-sequence token in front does so in the prompt's text, where one can see it.
        begins = self._hf.encode("")[:1] == [self._hf.bos_token_id] != [None]
        self._begin = self._hf.bos_token if begins else ""
        self.vocab_size = _config(directory).get("vocab_size") or len(self._hf)
        self.eos_id, self.stop_ids = _stop_ids(directory, self._hf.eos_token_id)

    def __len__(self) -> int:
        return max(self._hf.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        try:
            return list(self._hf.encode(text, add_special_tokens=False))
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise DataError(f"the tokenizer cannot encode {_short(text)}: {_one_line(error)}") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._hf.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        has_template = bool(self._hf.chat_template)
        if isinstance(prompt, str) and not (use_chat_template and has_template):
            return self._begin + prompt
        if not use_chat_template:
            raise DataError("the prompt is chat messages, which need data.chat_template = true")
        if not has_template:
            raise DataError("the prompt is chat messages, but the tokenizer has no chat template")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            return str(self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of its own: jinja2 errors, or what it raises itself
            raise DataError(f"the chat template refuses the messages: {_one_line(error)}") from error


class SentencePieceTokenizer:
    """A lone SentencePiece model. Control pieces (such as ``</s>``) have ids but no text, as SentencePiece has it.

    Nothing is put in front of a prompt: that a model wants a begin-of-sequence token stands in no ``.model`` file, but
    in a ``tokenizer_config.json``, and with one the tokenizer is transformers' to read.
    """

    def __init__(self, model: Path, directory: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DependencyError(f"{model}: a SentencePiece model needs the sentencepiece package") from None
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{model}: not a SentencePiece model: {_one_line(error)}") from error
        eos = self._sp.eos_id()
        self.vocab_size = _config(directory).get("vocab_size") or len(self)
        self.eos_id, self.stop_ids = _stop_ids(directory, eos if eos >= 0 else None)

    def __len__(self) -> int:
        return int(self._sp.get_piece_size())

    def encode(self, text: str) -> list[int]:
        return list(self._sp.encode(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        pieces = [int(i) for i in ids]
        if skip_special:
            return str(self._sp.decode(pieces))
        spans: list[str] = []
        text: list[int] = []
        for piece in pieces:
            if self._sp.is_control(piece):
                spans += [str(self._sp.decode(text)), self._sp.id_to_piece(piece)]
                text = []
            else:
                text.append(piece)
        return "".join([*spans, str(self._sp.decode(text))])

    def sample_words(self, count: int = 32) -> str:
        """The first words of the vocabulary, a space between them."""
        words = (str(self._sp.decode([i])).strip() for i in range(len(self)) if self._is_text(i))
        return " ".join(itertools.islice(filter(None, words), count))

    def _is_text(self, piece: int) -> bool:
        special = (self._sp.is_control, self._sp.is_unknown, self._sp.is_unused, self._sp.is_byte)
        return not any(is_kind(piece) for is_kind in special)

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        if isinstance(prompt, str):
            return prompt
        raise DataError("the prompt is chat messages, but a SentencePiece model has no chat template")


def _check_guess(guess: HuggingFaceTokenizer, model: SentencePieceTokenizer, path: Path) -> None:
    """Refuses a tokenizer of transformers' that gives back other words than the SentencePiece model it came from."""
    text = model.sample_words()
    given, back = (tokenizer.decode(tokenizer.encode(text)) for tokenizer in (model, guess))
    if given.split() != back.split():  # how many spaces stand between words is either's own affair
        raise DataError(
            f"{path}: transformers guesses a tokenizer that makes {_short(back)} of {_short(given)}: name the right "
            f"tokenizer_class in tokenizer_config.json, put a tokenizer.json beside it, or leave the .model alone there"
        )


def _checked(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Refuses ids that the model has no row for: it would read, or be asked to emit, a row that does not exist."""
    for what, highest in (("tokenizer", len(tokenizer) - 1), ("stop token", max(tokenizer.stop_ids))):
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: the {what}'s highest id is {highest}, but config.vocab_size = {tokenizer.vocab_size} "
                f"(ids go up to {tokenizer.vocab_size - 1}): is this another model's tokenizer?"
            )
    return tokenizer


def _stop_ids(directory: Path, own: int | None) -> tuple[int, tuple[int, ...]]:
    """(eos_id, stop_ids): the tokenizer's own end-of-sequence id first, else the first one configured."""
    found = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        value = _config(directory, name).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not found or not all(type(i) is int and i >= 0 for i in found):
        raise DataError(
            f"{directory}: no usable end-of-sequence token (found {found}): responses could never stop; set "
            f"eos_token_id in generation_config.json"
        )
    return found[0], tuple(sorted(set(found)))


def _config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
