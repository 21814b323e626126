"""Reference answers, graded as if they were responses: what the reward cannot use is found before its turn comes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.errors import DataError, RewardError
from megatron_gspo.rewards.interface import Ungraded
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rewards.scoring import guarded, lifetime, score_within
from megatron_gspo.types import Prompt, Rollout

PLAIN_LIMIT = 10_000
"""References that are graded before training when the reward is a plain function."""
SPARING_LIMIT = 8
"""And when it is an ``async`` one, or a combination with one, which may be a judge that is paid by the call."""
BUDGET_S = 60.0
"""Seconds after which the grading before training stops, whatever is left."""
FIRST_BATCH, BATCH = 8, 64
FAILING_S = 0.5
"""Seconds after which it stops when nothing but failures came: a reward that hangs hangs on the rest too."""
LONGEST_ENCODED = 2**16
"""Characters of a reference that are encoded, as a response's tokens."""
MADE_UP = "0"
"""A response that is wrong, unless it is the answer; for prompts without one."""
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Graded:
    """What the reward made of one reference."""

    score: float
    """In [0, 1]; NaN when it raised."""
    problem: str = ""
    """What is wrong with it whatever the others are: it raises, or is absent and needed."""
    fatal: bool = False
    """Whether a response to this prompt would end the run."""


@dataclass(frozen=True)
class Survey:
    """What grading many references found."""

    problems: dict[int, str]
    """Index of a prompt -> what is wrong with its reference; one prompt of those with the same reference."""
    fatal: frozenset[int]
    """Those of them whose turn would end the run."""
    graded: int
    """Distinct references that were graded."""
    distinct: int
    """Distinct ones among the prompts that were looked at."""
    looked_at: int
    """Prompts."""
    bad_prompts: int
    """Those of them whose reference is one of the unusable."""
    error: RewardError | None = None
    """What the reward raised, when it raised on every reference: the reward is at fault then, not they."""

    def describe(self) -> str:
        """ "47 distinct references of 600 prompts graded"."""
        part = f"{self.graded} of {self.distinct}" if self.graded < self.distinct else str(self.graded)
        return f"{part} distinct references of {self.looked_at} prompts graded, {len(self.problems)} unusable"


class ReferenceCheck:
    """Grades references, each once.

    A reference is known by its text for a reward that reads nothing else (``Reward.by_answer``: a built-in grader), and
    by text and metadata for another. An empty one is given ``MADE_UP`` as the response: a user's reward may read its
    metadata.
    """

    def __init__(self, reward: Reward, encode: Encode, eos_id: int, *, limit: int | None = None, seed: int = 0) -> None:
        self._reward, self._encode, self._eos_id, self._seed = reward, encode, eos_id, seed
        self._by_answer, self._sparing = reward.by_answer, reward.sparing
        self.limit = limit if limit is not None else SPARING_LIMIT if self._sparing else PLAIN_LIMIT
        """References graded before training; 0 switches all of this off."""
        self.known: dict[str, Graded] = {}

    def survey(self, prompts: Sequence[Prompt], looked_at: Sequence[int], budget_s: float = BUDGET_S) -> Survey:
        """Grades the distinct references of the prompts at ``looked_at``, up to ``limit`` of them, else a sample."""
        first: dict[str, int] = {}
        prompts_with: Counter[str] = Counter()
        if self.limit:
            for index in looked_at:
                with contextlib.suppress(DataError):  # a bad row, which is somebody else's finding
                    key = self.key(prompts[index])
                    first.setdefault(key, index)
                    prompts_with[key] += 1
        keys = list(first)
        if len(keys) > self.limit:
            chosen = np.random.default_rng(self._seed).choice(len(keys), self.limit, replace=False)
            keys = [keys[i] for i in sorted(chosen.tolist())]
        error = self._grade_all({key: prompts[first[key]] for key in keys}, budget_s)
        graded = [key for key in keys if key in self.known]
        problems = {first[key]: problem for key in graded if (problem := self.problem(key))}
        fatal = frozenset(first[key] for key in graded if self.known[key].fatal)
        bad = sum(prompts_with[key] for key in first if self.problem(key))
        return Survey(problems, fatal, len(graded), len(first), len(looked_at), bad, error)

    def judge(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        """What is wrong with the references of prompts that are drawn; those not seen before are graded now, unless
        the reward is ``async``: each of its calls may be paid for."""
        keys = {position: self.key(prompt) for position, prompt in prompts.items()}
        new = {keys[position]: prompt for position, prompt in prompts.items() if keys[position] not in self.known}
        if self.limit and not self._sparing:
            self._grade_all(new)
        return {position: problem for position, key in keys.items() if (problem := self.problem(key))}

    def is_fatal(self, prompt: Prompt) -> bool:
        """Whether the reward raises on this prompt's reference, as far as is known."""
        found = self.known.get(self.key(prompt))
        return found is not None and found.fatal

    def key(self, prompt: Prompt) -> str:
        """What a reference is known by."""
        known_by = prompt.answer if self._by_answer else repr((prompt.answer, prompt.metadata))
        return hashlib.blake2b(known_by.encode(errors="surrogatepass"), digest_size=12).hexdigest()

    def problem(self, key: str) -> str:
        """What is wrong with a reference; empty when nothing is, or when it was not graded."""
        found = self.known.get(key)
        if found is None or found.problem or found.score != 0:
            return found.problem if found else ""
        return "the reward gives the reference answer 0" if self._zero_is_wrong else ""

    @property
    def _zero_is_wrong(self) -> bool:
        """A built-in grader scores what is right; of another, only what gives other references more is known to."""
        return self._by_answer or any(graded.score > 0 for graded in self.known.values())

    def _grade_all(self, prompts: Mapping[str, Prompt], budget_s: float = math.inf) -> RewardError | None:
        """Grades into ``known`` within the budget; the first error of a user's reward that raises on every one."""
        left, begin = list(prompts.items()), time.monotonic()
        errors: list[RewardError] = []
        done = 0
        with undisturbed_generators(), guarded(self._reward):
            while done < len(left):
                batch = left[done : done + (BATCH if done else FIRST_BATCH)]
                results = asyncio.run(self._grade([prompt for _, prompt in batch]))
                for (key, prompt), result in zip(batch, results, strict=True):
                    self.known[key] = self._graded(prompt, result)
                errors += [failure for result in results if (failure := self._failure(result)) is not None]
                done += len(batch)
                if time.monotonic() - begin > (min(FAILING_S, budget_s) if len(errors) == done else budget_s):
                    break
        return errors[0] if errors and len(errors) == done and not self._by_answer else None

    async def _grade(self, prompts: Sequence[Prompt]) -> list[float | RewardError | Ungraded]:
        slots = asyncio.Semaphore(min(8, self._reward.concurrency))

        async def one(prompt: Prompt) -> float | RewardError | Ungraded:
            async with slots:
                response = as_response(prompt, prompt.answer or self._stand_in(), self._encode, self._eos_id)
                try:
                    (scored,) = await score_within(self._reward, [[response]])
                except RewardError as error:
                    return error
                return Ungraded(scored.ungraded_G[0]) if scored.ungraded_G else float(scored.rewards_G[0])

        async with lifetime(self._reward):
            return list(await asyncio.gather(*map(one, prompts)))

    def _failure(self, result: float | RewardError | Ungraded) -> RewardError | None:
        if isinstance(result, Ungraded):
            return RewardError(f"reward {self._reward.name!r} graded no reference: {result.reason}")
        return result if isinstance(result, RewardError) else None

    def _stand_in(self) -> str:
        return "" if self._by_answer else MADE_UP

    def _graded(self, prompt: Prompt, result: float | RewardError | Ungraded) -> Graded:
        absent = self._by_answer and not prompt.answer.strip()
        problem = f"there is no reference answer, and {self._reward.name!r} needs one" if absent else ""
        if isinstance(result, RewardError):
            return Graded(math.nan, problem or f"the reference answer cannot be graded: {result}", fatal=True)
        if isinstance(result, Ungraded):  # the grader's fault: it says nothing of the reference
            return Graded(math.nan, problem)
        if not prompt.answer and not absent:
            return Graded(math.nan)  # that it is answered is all there is to know
        return Graded(result, problem)


def as_response(prompt: Prompt, text: str, encode: Encode, eos_id: int, sample: int = 0) -> Rollout:
    """A finished response as an engine would return it; one that cannot be encoded is the stop token alone. Of a very
    long text (tests of a program, as a reference) the beginning is encoded: to encode megabytes takes a minute."""
    try:
        ids = encode(text[:LONGEST_ENCODED]) if text else []
    except DataError:  # a tokenizer of few characters
        ids = []
    ids = [*ids, eos_id]
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=np.asarray(ids, dtype=np.int32),
        rollout_logprobs=np.full(len(ids), -1.0, dtype=np.float32),
        finish_reason="stop",
        weight_versions=(0,),
        text=text,
    )


@contextlib.contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Gives Python's, numpy's and torch's generators their states back: what a reward draws here must not change what
    it draws in training."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
