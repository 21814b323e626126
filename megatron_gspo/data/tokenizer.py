"""Tokenizers of a model directory: Hugging Face's own, or a lone SentencePiece ``.model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_gspo.config import RunConfig
from megatron_gspo.data.huggingface import FILE, HuggingFaceTokenizer
from megatron_gspo.data.messages import ChatMessage
from megatron_gspo.data.model_files import read_json, short
from megatron_gspo.data.sentencepiece import SentencePieceTokenizer, is_tiktoken
from megatron_gspo.errors import DataError
from megatron_gspo.untrusted import strange_entry

LONGEST_CHARACTER = 4
"""Tokens that one character may take: bytes of UTF-8."""
HF_TOKENIZER_FILES = (FILE, "tokenizer_config.json", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """Text to token ids and back, with the ids that end a response."""

    eos_id: int
    """The model's end-of-sequence id; always one of ``stop_ids``."""
    stop_ids: tuple[int, ...]
    """Every id that ends a response, ascending: the union of ``generation_config.json``, ``config.json``, the
    tokenizer and ``rollout.stop_tokens``. The engine is given all of them."""
    vocab_size: int
    """Rows of the model's softmax (``config.vocab_size``): every id lies below it. ``len()`` counts the tokenizer's
    own entries, which may be fewer."""

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: so many times as many tokens hold every text that has no more."""
        ...

    @property
    def turn_end(self) -> int | None:
        """The special token with which the chat template ends an assistant's turn; None where it writes none."""
        ...

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of exactly this text; nothing is added in front or behind. Raises DataError."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""

    def token_id(self, text: str) -> int | None:
        """The one token that this text is; None when it is none, or several."""
        ...

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        """The text that ``encode`` is given for a prompt, which ``messages.check_prompt`` has checked.

        A text becomes a user's turn when ``use_chat_template`` is set and the tokenizer has a template; otherwise it
        stays as it is, after the begin-of-sequence token of a tokenizer that puts one there (unless the text has it
        already). Chat messages need the template. Raises DataError without it, for a text that was rendered already,
        and for a template that leaves out what a message says.
        """
        ...


def open_tokenizer(config: RunConfig, model_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer of ``model_dir`` (``model.path`` when None), with ``rollout.stop_tokens`` and
    ``data.chat_template_kwargs``. Raises DataError."""
    return load_tokenizer(
        model_dir or config.model.path,
        stop_tokens=config.rollout.stop_tokens,
        template_variables=config.data.chat_template_kwargs,
    )


def load_tokenizer(
    model_dir: str | Path,
    *,
    stop_tokens: Sequence[str | int] = (),
    template_variables: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (nothing is downloaded), or of a SentencePiece ``.model`` file.

    ``tokenizer.json`` is the tokenizer where there is one, whatever class ``tokenizer_config.json`` names. Without it
    transformers builds one from ``vocab.json`` or a ``.model`` file by the class that is named or guessed, and it must
    give the vocabulary's own words back. A directory whose only tokenizer file is a ``.model`` is read by sentencepiece
    itself. Code that a directory brings along is never run.

    ``stop_tokens``, texts or ids, end a response besides those of the model; ``template_variables`` are handed to its
    chat template. Raises DataError when there is no tokenizer, no stop token, an id at or above ``config.vocab_size``,
    a tokenizer that loses text, or a variable that the template never reads.
    """
    path = Path(model_dir)
    tokenizer = _load(path, template_variables)
    tokenizer.stop_ids = tuple(sorted({*tokenizer.stop_ids, *(_stop_id(tokenizer, token) for token in stop_tokens)}))
    return _checked(tokenizer, path)


def training_end(tokenizer: Tokenizer, use_chat_template: bool) -> int:
    """The token that ends a training example: the one with which the chat template ends a turn, else ``eos_id``.

    Raises DataError when rollouts would not stop there.
    """
    if use_chat_template and (problem := turn_end_problem(tokenizer)):
        raise DataError(f"{problem}, and would be taught to end there: set {turn_end_fix(tokenizer)}")
    return tokenizer.eos_id if tokenizer.turn_end is None or not use_chat_template else tokenizer.turn_end


def turn_end_problem(tokenizer: Tokenizer) -> str:
    """What is wrong when the chat template ends a turn with a token at which responses do not stop; else empty."""
    end = tokenizer.turn_end
    if end is None or end in tokenizer.stop_ids:
        return ""
    stops = ", ".join(f"{tokenizer.decode([i], skip_special=False)!r} ({i})" for i in tokenizer.stop_ids)
    return (
        f"the chat template ends a turn with {tokenizer.decode([end], skip_special=False)!r} ({end}), but responses "
        f"stop only at {stops}: they would go on past their turn"
    )


def turn_end_fix(tokenizer: Tokenizer) -> str:
    """The setting that mends it."""
    text = "" if tokenizer.turn_end is None else tokenizer.decode([tokenizer.turn_end], skip_special=False)
    return f'rollout.stop_tokens = ["{text}"]'


def response_text(tokenizer: Tokenizer, *, special_tokens: bool) -> Callable[[Sequence[int]], str]:
    """How a response's tokens become the text that rewards read: without the stop token at its end, and without
    special tokens unless they are asked for (``reward.special_tokens``)."""
    stops = frozenset(tokenizer.stop_ids)

    def decode(ids: Sequence[int]) -> str:
        said = list(ids[:-1] if len(ids) and ids[-1] in stops else ids)
        return tokenizer.decode(said, skip_special=not special_tokens)

    return decode


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens too. A part of a character is U+FFFD."""
    texts = []
    alone = [tokenizer.decode([token], skip_special=False) for token in ids]
    for i, text in enumerate(alone):
        # Many a tokenizer drops the space of a text's first token, so a token is read behind those before it, from
        # where they begin a character.
        for start in range(i - 1, max(-1, i - 1 - LONGEST_CHARACTER), -1):
            before = alone[start] if start == i - 1 else tokenizer.decode(ids[start:i], skip_special=False)
            both = tokenizer.decode(ids[start : i + 1], skip_special=False)
            if "\ufffd" not in before and both.startswith(before):
                texts.append(both.removeprefix(before))
                break
        else:
            texts.append(text)
    return texts


def _load(path: Path, variables: Mapping[str, Any] | None) -> Tokenizer:
    if path.is_file() and path.suffix == ".model":
        return _plain(SentencePieceTokenizer(path, directory=path.parent), path, variables)
    if not path.is_dir():
        raise DataError(f"{path}: no such model directory")
    if problem := strange_entry(path):
        raise DataError(f"{path}: {problem}")
    models = sorted(file for file in path.glob("*.model") if file.is_file())
    if not (path / FILE).is_file():
        _check_remote_code(path, models)
    if any((path / name).is_file() for name in HF_TOKENIZER_FILES):
        tokenizer = HuggingFaceTokenizer(path, variables)
        if not (path / FILE).is_file():
            _check_guess(tokenizer, path, models)
        return tokenizer
    if len(models) == 1:
        return _plain(SentencePieceTokenizer(models[0], directory=path), path, variables)
    found = ", ".join(model.name for model in models) or "none"
    raise DataError(
        f"{path}: no tokenizer: expected {' or '.join(HF_TOKENIZER_FILES[:2])}, or one SentencePiece .model "
        f"(found: {found})"
    )


def _plain(tokenizer: SentencePieceTokenizer, path: Path, variables: Mapping[str, Any] | None) -> Tokenizer:
    """A tokenizer without a template. Raises DataError when the directory or the settings have something for one."""
    directory = path if path.is_dir() else path.parent
    if path.is_dir() and (directory / "chat_template.jinja").is_file():
        raise DataError(
            f"{path}: chat_template.jinja beside a lone .model is read by nothing: add the model's tokenizer.json and "
            f"tokenizer_config.json"
        )
    if variables:
        raise DataError(f"{path}: data.chat_template_kwargs is set, but a SentencePiece model has no chat template")
    return tokenizer


def _check_remote_code(path: Path, models: Sequence[Path]) -> None:
    """Refuses a directory without ``tokenizer.json`` whose tokenizer is made by code that it brings along."""
    named = read_json(path, "tokenizer_config.json").get("auto_map")
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    tiktoken = [model.name for model in models if model.name == "tiktoken.model" or is_tiktoken(model)]
    if not (classes or tiktoken):
        return
    code = next((str(name) for name in classes if name), "") if isinstance(classes, list) else str(classes or "")
    how = f"{tiktoken[0]} is a tiktoken vocabulary without its rules" if tiktoken else "there is no tokenizer.json"
    made = f" (they stand in {code})" if code and tiktoken else f", and {code} is code of the directory" if code else ""
    raise DataError(
        f"{path}: {how}{made}; such code is never run here: put a tokenizer.json beside it, as docs/models.md "
        f"(Tokenizers) says"
    )


def _check_guess(guess: HuggingFaceTokenizer, path: Path, models: Sequence[Path]) -> None:
    """Refuses a tokenizer of transformers' that gives back other words than its vocabulary has."""
    model = SentencePieceTokenizer(models[0], directory=path) if len(models) == 1 else None
    text = model.sample_words() if model else guess.sample_words()
    given = model.decode(model.encode(text)) if model else text
    try:
        back = guess.decode(guess.encode(text))
    except DataError as error:
        back = str(error)
    if given.split() != back.split():  # how many spaces stand between words is either's own affair
        name = read_json(path, "tokenizer_config.json").get("tokenizer_class")
        raise DataError(
            f"{path}: transformers {f'builds {name}, which' if name else 'guesses a tokenizer that'} makes "
            f"{short(back)} of {short(given)}: put a tokenizer.json beside it, or name the right tokenizer_class in "
            f"tokenizer_config.json" + (", or leave the .model alone there" if model else "")
        )


def _stop_id(tokenizer: Tokenizer, token: str | int) -> int:
    """One of ``rollout.stop_tokens`` as an id. Raises DataError for what is not one token of the vocabulary."""
    if isinstance(token, int):
        if not 0 <= token < tokenizer.vocab_size:
            raise DataError(f"rollout.stop_tokens: {token} is outside the vocabulary of {tokenizer.vocab_size}")
        return token
    found = tokenizer.token_id(token)
    if found is None:
        raise DataError(f"rollout.stop_tokens: {token!r} is not one token of the model's vocabulary")
    return found


def _checked(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Refuses ids that the model has no row for: it would read, or be asked to emit, a row that does not exist."""
    for what, highest in (("tokenizer", len(tokenizer) - 1), ("stop token", max(tokenizer.stop_ids))):
        if highest >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: the {what}'s highest id is {highest}, but config.vocab_size = {tokenizer.vocab_size} "
                f"(ids go up to {tokenizer.vocab_size - 1}): is this another model's tokenizer?"
            )
    return tokenizer
