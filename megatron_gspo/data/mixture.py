"""Several sources of prompts as one: the weights say whose turn it is, and each has an order of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, overload

import numpy as np

from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.data.fingerprint import fingerprint
from megatron_gspo.data.prompts import Looked, PromptSet
from megatron_gspo.errors import DataError
from megatron_gspo.types import Prompt


@dataclass(frozen=True)
class Source:
    """One of them."""

    name: str
    weight: float
    """Its share of all prompts that are drawn, relative to the others'."""
    prompts: PromptSet


class MixedPrompts(Sequence[Prompt]):
    """The prompts of all sources, one after another; each has its source's name, in its id too: "math/line-7"."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source.prompts) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        source, own = self._find(index)
        return _of_source(source, source.prompts.prompts[own])

    def __iter__(self) -> Iterator[Prompt]:
        return (_of_source(source, prompt) for source in self._sources for prompt in source.prompts.prompts)

    def place(self, index: int) -> str:
        """Where a prompt stands: "path, line 7"."""
        source, own = self._find(index)
        return source.prompts.place(own)

    def _find(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        which = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[which]
        return source, index - int(self._ends[which]) + len(source.prompts)


def _of_source(source: Source, prompt: Prompt) -> Prompt:
    return replace(prompt, id=f"{source.name}/{prompt.id}", source=source.name)


def mix(sources: Sequence[Source]) -> PromptSet:
    """The prompts of all sources as one set."""
    looked = [source.prompts.looked for source in sources]
    prints = tuple(looks.fingerprint for looks in looked)
    names = tuple(source.name for source in sources)
    return PromptSet(
        MixedPrompts(sources),
        sum(source.prompts.skipped for source in sources),
        tuple(f"{source.name}: {problem}" for source in sources for problem in source.prompts.problems),
        Looked(
            rows=sum(looks.rows for looks in looked),
            total=sum(looks.total for looks in looked),
            whole=all(looks.whole for looks in looked),
            prompt_tokens=tuple(tokens for looks in looked for tokens in looks.prompt_tokens),
            format=", ".join(dict.fromkeys(looks.format for looks in looked)),
            fingerprint=lambda: fingerprint(zip(names, (one() for one in prints), strict=True)),
        ),
    )


class MixtureCursor:
    """The order of the prompts of several sources: as ``PromptCursor``, for indices into ``MixedPrompts``.

    After any number t of prompts, source i has given between t w_i - 1 and t w_i + 1 of them, w_i being its share of
    the weights: of the sources that would not be ahead by more than 1 - 1/(2n - 2), the one goes next that would be
    behind by that much first (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980). What one
    ``take`` returns is shuffled, so that no leader and no mini-batch always has the same source. Each source walks
    over its own prompts epoch after epoch, in an order of (seed, its name): other sources do not change it.
    """

    def __init__(self, sources: Sequence[tuple[str, int, float]], seed: int, shuffle: bool = True) -> None:
        """``sources``: (name, prompts, weight) of each, in the order of ``MixedPrompts``."""
        self.seed, self.shuffle = seed, shuffle
        self.names = [name for name, _, _ in sources]
        self.num_prompts = sum(count for _, count, _ in sources)
        self._weights = [Fraction(repr(weight)) for _, _, weight in sources]
        total = sum(self._weights)
        self._shares = [weight / total for weight in self._weights]
        self._cursors = [PromptCursor(count, _own_seed(seed, name), shuffle) for name, count, _ in sources]
        self._offsets = np.cumsum([0, *(count for _, count, _ in sources)]).tolist()
        self._given = [0] * len(sources)

    def take(self, n: int) -> list[int]:
        """The next ``n`` indices."""
        taken = sum(self._given)
        indices = [self._next(self._whose_turn()) for _ in range(n)]
        entropy = [self.seed % 2**64, 1, taken]
        shuffled = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).permutation(n)
        return [indices[place] for place in shuffled.tolist()]

    def instead(self, indices: Sequence[int]) -> list[int]:
        """For each index, the next of its own source: what stands in for a bad prompt leaves the shares as they are."""
        return [self._next(self.source_of(index), counts=False) for index in indices]

    def source_of(self, index: int) -> int:
        """Which source a prompt is of."""
        return int(np.searchsorted(self._offsets, index, side="right")) - 1

    def order(self) -> dict[str, Any]:
        """What the order is a function of."""
        weights = [float(weight) for weight in self._weights]
        counts = [cursor.num_prompts for cursor in self._cursors]
        sources = [list(each) for each in zip(self.names, counts, weights, strict=True)]
        return {"num_prompts": self.num_prompts, "seed": self.seed, "shuffle": self.shuffle, "sources": sources}

    def state_dict(self) -> dict[str, Any]:
        """As JSON: what a checkpoint keeps."""
        places = [[cursor.epoch, cursor.position] for cursor in self._cursors]
        return self.order() | {"given": list(self._given), "places": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken. Raises DataError when sources, weights or the seed are not the same."""
        for name, own in self.order().items():
            if state.get(name) != own:
                raise DataError(
                    f"the checkpoint's cursor has {name} = {state.get(name)}, this run has {own}: the order of the "
                    f"prompts would not continue; resume with the same sources, weights, seed and shuffle"
                )
        self._given = list(state["given"])
        for cursor, (epoch, position) in zip(self._cursors, state["places"], strict=True):
            cursor.load_state_dict({**cursor.state_dict(), "epoch": epoch, "position": position})

    def _next(self, source: int, *, counts: bool = True) -> int:
        (own,) = self._cursors[source].take(1)
        self._given[source] += counts
        return int(self._offsets[source]) + own

    def _whose_turn(self) -> int:
        count = len(self._shares)
        if count == 1:
            return 0
        slack = Fraction(1, 2 * count - 2)
        time = sum(self._given) + 1
        behind = [i for i, share in enumerate(self._shares) if share * time - self._given[i] >= slack]
        return min(behind, key=lambda i: ((self._given[i] + 1 - slack) / self._shares[i], i))


def _own_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
