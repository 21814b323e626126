"""Whether training prompts hold the problems of a suite.

Texts are compared as words of lower-case letters and digits. A problem is taken for known when half of its runs of 13
words, the length that GPT-3's authors took (arXiv 2005.14165, appendix C), stand in one training prompt; a problem of
fewer words when all of it does. That finds copies with another instruction around them, not paraphrases.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.config import DataConfig
from megatron_gspo.data.files import open_rows
from megatron_gspo.data.formats import Paths, read_example, recognise
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.suites.base import Problem

WORDS = 13
SHARE = 0.5
MOST_ROWS = 200_000
"""Training rows that are looked at."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """What was found."""

    looked: int
    """Training prompts that were looked at."""
    whole: bool
    """Whether those were all of them."""
    problems: tuple[str, ...]
    """Ids of problems that stand in a training prompt."""

    def warning(self, of: int, path: str) -> str:
        """One line; empty where nothing was found."""
        if not self.problems:
            return ""
        some = ", ".join(self.problems[:3]) + (", ..." if len(self.problems) > 3 else "")
        return f"{len(self.problems)} of {of} problems stand in training prompts of {path} ({some})"


def find_overlap(problems: Sequence[Problem], prompts: Iterable[str]) -> Overlap:
    """Which of the problems stand in one of the first ``MOST_ROWS`` prompts."""
    where: dict[int, set[int]] = {}
    sizes = []
    for index, problem in enumerate(problems):
        grams = set(_grams(_words(problem.statement)))
        sizes.append(len(grams))
        for gram in grams:
            where.setdefault(gram, set()).add(index)
    lengths = sorted({min(WORDS, len(_words(problem.statement))) for problem in problems} - {0})
    known: set[int] = set()
    looked, left = 0, iter(prompts)
    for prompt in itertools.islice(left, MOST_ROWS):
        looked += 1
        words = _words(prompt)
        seen = {gram for length in lengths for gram in _grams(words, length) if gram in where}
        counts = Counter(index for gram in seen for index in where[gram])
        known |= {index for index, count in counts.items() if count >= SHARE * sizes[index]}
    return Overlap(looked, next(left, None) is None, tuple(problems[index].id for index in sorted(known)))


def training_texts(data: DataConfig) -> Iterator[str]:
    """The prompts of ``data.path``, or of every source, as they were written, before any template; rows that cannot be
    read are passed over.

    Raises MegatronGspoError where the files cannot be read at all.
    """
    for each in [data.of_source(source) for source in data.sources] or [data]:
        yield from _texts(each)


def _texts(data: DataConfig) -> Iterator[str]:
    rows = open_rows(Path(data.path))
    fields = Paths.named_by(data)
    first = (rows.read(index) for index in range(min(100, len(rows))))
    form = data.format if data.format != "auto" else recognise((row.fields for row in first if not row.problem), fields)
    for row in rows.read_all():
        try:
            example = read_example(form, fields, dict(row.fields))
        except MegatronGspoError:
            continue
        prompt = example.prompt
        yield prompt if isinstance(prompt, str) else "\n".join(str(turn["content"] or "") for turn in prompt)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], length: int | None = None) -> Iterator[int]:
    """Hashes of every run of ``length`` words; of ``WORDS`` or, in a shorter text, of all."""
    length = length or min(WORDS, len(words))
    if not length:
        return
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))
