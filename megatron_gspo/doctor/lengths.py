"""Limits of prompts and responses against each other, the model's positions, and what the data holds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from megatron_gspo.data.prompts import CompletionSet, PromptSet
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.errors import DataError
from megatron_gspo.rewards.registry import answers_are_responses
from megatron_gspo.rollout.engine import ENGINES

REFERENCES = 256
"""Reference answers that are measured in tokens."""


def fit_into(facts: Facts, limit: int) -> str:
    """Which of the two limits to lower so that both fit into ``limit`` tokens, with values: the one that is at fault.

    A prompt limit above the longest prompt costs room and gives nothing: it goes first.
    """
    rollout = facts.config.rollout
    longest = longest_prompt(facts)
    if longest is None:
        if rollout.max_prompt_tokens >= limit:
            return f"rollout.max_prompt_tokens: alone it leaves nothing of {limit} for a response"
        return (
            f"rollout.max_response_tokens = {limit - rollout.max_prompt_tokens}, or a lower rollout.max_prompt_tokens"
        )
    if longest >= limit:
        half = max(1, limit // 2)
        return (
            f"data.path: its longest prompt has {longest} tokens, and nothing is left for a response; "
            f"rollout.max_prompt_tokens = {half} with data.skip_bad = true leaves longer ones out"
        )
    prompt = min(longest, rollout.max_prompt_tokens)
    shorter = f"rollout.max_prompt_tokens = {prompt}" + " (the longest prompt)" * (prompt == longest)
    if prompt == rollout.max_prompt_tokens:
        return f"rollout.max_response_tokens = {limit - prompt}"
    if prompt + rollout.max_response_tokens <= limit:
        return shorter
    return f"{shorter} and rollout.max_response_tokens = {limit - prompt}"


def longest_prompt(facts: Facts) -> int | None:
    """Tokens of the longest prompt that training would take; None where no prompt can be read."""
    if facts.problem("prompts"):
        return None
    tokens, limit = facts.prompts.looked.prompt_tokens, facts.config.rollout.max_prompt_tokens
    return max((count for count in tokens if count <= limit), default=max(tokens))


def kept_positions(facts: Facts) -> int:
    """Of the model's positions, those that the engine gives to no request; fine-tuning has no engine."""
    return 0 if facts.supervised else ENGINES[facts.config.rollout.engine].kept_positions


def check_lengths(facts: Facts, prompts: PromptSet | CompletionSet) -> list[Check]:
    """What was read against the limits, and whether enough is left where longer ones are skipped."""
    rollout = facts.config.rollout
    lengths = {"prompt": (prompts.looked.prompt_tokens, rollout.max_prompt_tokens)}
    if isinstance(prompts, CompletionSet):
        lengths["response"] = (prompts.looked.response_tokens, rollout.max_response_tokens)
    checks = [_against_limit(facts, prompts, what, *found) for what, found in lengths.items()]
    return checks + (_references(facts, prompts) if isinstance(prompts, PromptSet) else [])


def _against_limit(
    facts: Facts, prompts: PromptSet | CompletionSet, what: str, tokens: tuple[int, ...], limit: int
) -> Check:
    longest, over = max(tokens), sum(count > limit for count in tokens)
    setting = f"rollout.max_{what}_tokens"
    text = f"the longest {what} of the first {len(tokens)} has {longest} tokens, {setting} = {limit}"
    if not over:
        return ok(text)
    if over == len(tokens):  # to skip them would leave nothing
        return error(f"{text}: all {over} are too long, the shortest has {min(tokens)}", f"{setting} = {longest}")
    if not facts.config.data.skip_bad:
        return error(f"{text}: {over} are too long", f"{setting} = {longest}, or data.skip_bad = true")
    left, step = len(tokens) - over, facts.config.train.prompts_per_step
    if prompts.looked.whole and left < step:
        return error(
            f"{text}: {over} are skipped, and the {left} that are left are fewer than train.prompts_per_step = {step}",
            f"{setting} = {longest}",
        )
    return warning(f"{text}: {over} are skipped", f"{setting} = {longest}")


def _range(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low} tokens" if low == high else f"{low} to {high} tokens"


def _references(facts: Facts, prompts: PromptSet) -> list[Check]:
    """Responses too short for what they are to say, as far as reference answers show it."""
    limit, tokenizer = facts.config.rollout.max_response_tokens, facts.tokenizer
    setting = f"rollout.max_response_tokens = {limit}"
    answers = set()
    measured = answers_are_responses(facts.config.reward)
    for index in prompts.sample(REFERENCES, 0)[:REFERENCES] if measured else ():
        with contextlib.suppress(DataError):  # a bad row of a long file, found when it is drawn
            answers.add(prompts.prompts[index].answer)
    lengths = [len(tokenizer.encode(answer)) + 1 for answer in sorted(answers - {""})]
    over = sum(length > limit for length in lengths)
    if over > len(lengths) / 2:
        return [
            warning(
                f"{setting}: {over} of {len(lengths)} reference answers that were measured are longer, with the token "
                f"that ends them ({_range(lengths)}): responses would be cut before they answer",
                f"rollout.max_response_tokens = {max(lengths)} or more",
            )
        ]
    if limit == 1:
        return [
            warning(
                f"{setting}: a response is one token, and either says nothing (it is the token that ends it) or is cut",
                "rollout.max_response_tokens: room for an answer and the token that ends it",
            )
        ]
    return []
