"""A lone SentencePiece ``.model`` file as a tokenizer."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_gspo.data.messages import ChatMessage
from megatron_gspo.data.model_files import find_stop_ids, one_line, softmax_rows
from megatron_gspo.errors import DataError, DependencyError
from megatron_gspo.untrusted import open_regular, what_instead

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


def is_tiktoken(model: Path) -> bool:
    """Whether the file is a tiktoken vocabulary: a line is a token's bytes in base64, and its rank."""
    with open_regular(model) as lines:
        return _TIKTOKEN_LINE.fullmatch(lines.readline(4096)) is not None


class SentencePieceTokenizer:
    """A lone SentencePiece model. Control pieces (such as ``</s>``) have ids but no text, as SentencePiece has it.

    Nothing is put in front of a prompt: that a model wants a begin-of-sequence token stands in no ``.model`` file, but
    in a ``tokenizer_config.json``, and with one the tokenizer is transformers' to read.
    """

    turn_end = None

    def __init__(self, model: Path, directory: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DependencyError(f"{model}: a SentencePiece model needs the sentencepiece package") from None
        with open_regular(model) as start:
            if words := what_instead(start.read(64)):
                raise DataError(f"{model}: it {words}")
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{model}: not a SentencePiece model: {one_line(error)}") from error
        eos = self._sp.eos_id()
        self.vocab_size = softmax_rows(directory) or len(self)
        self.eos_id, self.stop_ids = find_stop_ids(directory, eos if eos >= 0 else None)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of it."""
        return max((len(self._sp.id_to_piece(i)) for i in range(len(self))), default=1)

    def __len__(self) -> int:
        return int(self._sp.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._sp.encode(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
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

    def token_id(self, text: str) -> int | None:
        """Of a piece; None where there is none."""
        piece = int(self._sp.piece_to_id(text))
        if self._sp.id_to_piece(piece) == text:  # another piece is the unknown one
            return piece
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None

    def sample_words(self, count: int = 32) -> str:
        """The first words of the vocabulary, a space between them."""
        words = (str(self._sp.decode([i])).strip() for i in range(len(self)) if self._is_text(i))
        return " ".join(itertools.islice(filter(None, words), count))

    def _is_text(self, piece: int) -> bool:
        special = (self._sp.is_control, self._sp.is_unknown, self._sp.is_unused, self._sp.is_byte)
        return not any(is_kind(piece) for is_kind in special)

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        """It has no chat template."""
        if isinstance(prompt, str):
            return prompt
        raise DataError("the prompt is chat messages, but a SentencePiece model has no chat template")
