"""Whether a response has the form that was asked for: 1 or 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.thinking import MAX_RESPONSE
from megatron_gspo.types import Prompt, Rollout


class Format:
    """By ``sections``: each of them once, in this order, as ``<name>...</name>`` with text in it and nothing but white
    space between them, then, unless ``answer`` is false, more text. The opening of the first may end the prompt, as
    some chat templates write it. By ``pattern``: a regular expression that the whole response matches, in which a dot
    is any character, line breaks too."""

    def __init__(self, sections: Sequence[str] | None = None, answer: bool = True, pattern: str | None = None) -> None:
        if pattern is not None and sections is not None:
            raise ConfigError("reward 'format' takes sections or a pattern, not both")
        self._sections, self._answer = ["think"] if sections is None else list(sections), answer
        if not all(isinstance(name, str) and re.fullmatch(r"[\w:-]+", name) for name in self._sections):
            raise ConfigError(f"reward 'format': sections = {self._sections!r} are not names of tags")
        try:
            self._pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"reward 'format': pattern = {pattern!r}: {error}") from None

    def __call__(self, prompt: Prompt, response: Rollout) -> float:
        text = response.text
        if len(text) > MAX_RESPONSE:
            return 0.0
        if self._pattern is not None:
            return float(self._pattern.fullmatch(text) is not None)
        first = f"<{self._sections[0]}>" if self._sections else ""
        opened = bool(first) and prompt.text[-200:].rstrip().endswith(first) and not text.lstrip().startswith(first)
        return float(self._is_sound(first + text if opened else text))

    def _is_sound(self, text: str) -> bool:
        rest = text
        for name in self._sections:
            begin, end = f"<{name}>", f"</{name}>"
            if text.count(begin) != 1 or text.count(end) != 1 or not rest.lstrip().startswith(begin):
                return False
            inside, found, rest = rest.lstrip()[len(begin) :].partition(end)
            if not found or not inside.strip():
                return False
        return bool(rest.strip()) == self._answer
