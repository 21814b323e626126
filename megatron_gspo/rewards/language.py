"""How much of a response is written in given scripts, as a number in [0, 1]."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.thinking import MAX_RESPONSE
from megatron_gspo.types import Prompt, Rollout

SCRIPTS: dict[str, tuple[str, ...]] = {
    "han": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK", "KATAKANA-HIRAGANA"),
    "korean": ("HANGUL",),
    **{
        name: (name.upper(),)
        for name in (
            *("latin", "greek", "cyrillic", "arabic", "hebrew", "armenian", "georgian", "ethiopic", "devanagari"),
            *("bengali", "gurmukhi", "gujarati", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao"),
            *("myanmar", "khmer", "tibetan", "mongolian"),
        )
    },
}
"""Name -> how the Unicode names of its letters begin."""


class Language:
    """The share of a response's letters that are of one of ``scripts`` (what is no letter counts on neither side); 1
    for a response without a letter. A script is no language: Latin letters are English and Vietnamese."""

    def __init__(self, scripts: Sequence[str]) -> None:
        unknown = [name for name in ([] if isinstance(scripts, str) else scripts) if name not in SCRIPTS]
        if isinstance(scripts, str) or not scripts or unknown:
            raise ConfigError(f"reward 'language': scripts = {scripts!r}: a list of {', '.join(sorted(SCRIPTS))}")
        self._beginnings = frozenset(beginning for name in scripts for beginning in SCRIPTS[name])

    def __call__(self, prompt: Prompt, response: Rollout) -> float:
        counts = Counter(response.text[:MAX_RESPONSE])
        letters = {character: count for character, count in counts.items() if character.isalpha()}
        wanted = sum(count for character, count in letters.items() if script_of(character) in self._beginnings)
        return wanted / sum(letters.values()) if letters else 1.0


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str:
    """The word that a letter's Unicode name begins with, its width aside.

    >>> script_of("a"), script_of("\u4e2d"), script_of("\uff21")
    ('LATIN', 'CJK', 'LATIN')
    """
    words = unicodedata.name(character, "?").split()
    while words[0] in ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "LETTER") and len(words) > 1:
        words = words[1:]
    return words[0]
