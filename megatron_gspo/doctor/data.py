"""Checks of the prompts and of the reward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_gspo.data.prompts import CompletionSet, PromptSet
from megatron_gspo.data.rows import PARQUET_SUFFIXES
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import SAMPLE, Facts
from megatron_gspo.doctor.tokenizer import show_prompt
from megatron_gspo.errors import DataError
from megatron_gspo.rewards.registry import resolve_reward
from megatron_gspo.rewards.scoring import score_groups
from megatron_gspo.types import Prompt, Rollout

FEWEST_EVAL = 512
"""Held-out prompts below which an accuracy's standard error exceeds 2.2% (sqrt(0.25 / 512))."""
MADE_UP = "0"
"""A response that is wrong, unless it is the answer."""
COUNTED_BYTES = 2**30
"""How far into a file of JSON lines rows are counted."""


def check_prompts(facts: Facts) -> list[Check]:
    """The first prompts well-formed, enough of them, and none too long; the first of them as the model reads it."""
    config, prompts = facts.config, facts.prompts
    rows, counted = count_rows(Path(config.data.path), prompts, SAMPLE)
    if config.data.limit is not None:
        rows = min(rows, config.data.limit)
    text = f"{config.data.path}: {counted}{rows} prompts, {config.train.prompts_per_step} a step"
    if prompts.skipped:
        text += f"; {prompts.skipped} of the first {prompts.skipped + len(prompts)} skipped ({prompts.problems[0]})"
    checks = [_enough(facts, text, rows, bool(counted))]
    return [*checks, *_lengths(facts, prompts), show_prompt(facts.tokenizer, _plain(prompts)[0])]


def check_eval_prompts(facts: Facts) -> Check:
    config = facts.config
    path, every, wanted = config.data.eval_path, config.eval.every, config.eval.prompts
    if facts.supervised:
        return ok("supervised fine-tuning does not evaluate")
    if not path:
        return ok("data.eval_path is empty: no evaluation")
    if not every:
        return warning(f"{path} is never read: eval.every = 0", "eval.every, or an empty data.eval_path")
    prompts = facts.read_prompts(path, min(SAMPLE, wanted))
    rows, counted = count_rows(Path(path), prompts, SAMPLE)
    used = min(rows, wanted)
    text = f"{path}: {counted}{rows} prompts, {used} used (eval.prompts = {wanted}), every {every} outer steps"
    longest = max(len(prompt.token_ids) for prompt in _plain(prompts))
    if longest > config.rollout.max_prompt_tokens and not config.data.skip_bad:
        return error(f"{text}; one has {longest} tokens", f"rollout.max_prompt_tokens = {longest}, or data.skip_bad")
    if used < FEWEST_EVAL:
        percent = 100 * 1.96 * (0.25 / used) ** 0.5
        return warning(
            f"{text}: an accuracy of 50% is known to +-{percent:.2g}%", f"eval.prompts and a file of {FEWEST_EVAL}"
        )
    return ok(text)


def check_reward(facts: Facts) -> Check:
    """Found, and called on one prompt: with the reference answer as the response, and with a made-up one."""
    config = facts.config
    if facts.supervised:
        return ok("supervised fine-tuning has no reward")
    reward = resolve_reward(config.reward)
    prompt = _plain(facts.prompts)[0]
    texts = (prompt.answer or MADE_UP, MADE_UP)
    rollouts = [_response(facts, prompt, text, sample) for sample, text in enumerate(texts)]
    (scored,) = asyncio.run(score_groups(reward, [rollouts]))
    right, wrong = scored.rewards_G.tolist()
    text = f"{reward.name} on prompt {prompt.id!r}: {right:g} for its reference answer, {wrong:g} for {MADE_UP!r}"
    if scored.token_rewards_G is not None and config.algorithm.name == "gspo":
        return warning(
            f"{text}; it gives one reward a token, and gspo takes their mean", 'algorithm.name = "gspo-token"'
        )
    return ok(text)


def count_rows(path: Path, read: PromptSet | CompletionSet, sample: int) -> tuple[int, str]:
    """(rows, "" or "at least "): those read when they are all, else counted without reading them."""
    if len(read) < sample:
        return len(read), ""
    if path.suffix in PARQUET_SUFFIXES:
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows), ""
    rows = 0
    with path.open("rb") as lines:
        for line in lines:
            rows += bool(line.strip())
            if lines.tell() > COUNTED_BYTES:
                return rows, "at least "
    return rows, ""


def _enough(facts: Facts, text: str, rows: int, more: bool) -> Check:
    config = facts.config
    step = config.train.prompts_per_step
    if rows < step and not more:
        return error(
            f"{text}: one would be drawn twice in a step", f"train.prompts_per_step <= {rows}, or more prompts"
        )
    epochs = config.train.outer_steps * step / rows
    return ok(f"{text}, {epochs:.2g} epochs in {config.train.outer_steps} outer steps")


def _lengths(facts: Facts, prompts: PromptSet | CompletionSet) -> list[Check]:
    rollout = facts.config.rollout
    lengths = {"prompt": ([len(prompt.token_ids) for prompt in _plain(prompts)], rollout.max_prompt_tokens)}
    if isinstance(prompts, CompletionSet):
        responses = [len(example.completion_ids) for example in prompts.completions]
        lengths["response"] = (responses, rollout.max_response_tokens)
    checks = []
    for what, (tokens, limit) in lengths.items():
        longest, over = max(tokens), sum(count > limit for count in tokens)
        setting = f"rollout.max_{what}_tokens"
        text = f"the longest {what} of the first {len(tokens)} has {longest} tokens, {setting} = {limit}"
        if not over:
            checks.append(ok(text))
        elif facts.config.data.skip_bad:
            checks.append(warning(f"{text}: {over} are skipped", f"{setting} = {longest}"))
        else:
            checks.append(error(f"{text}: {over} are too long", f"{setting} = {longest}, or data.skip_bad = true"))
    return checks


def _plain(prompts: PromptSet | CompletionSet) -> Sequence[Prompt]:
    """The prompts, those of examples included."""
    if isinstance(prompts, CompletionSet):
        return [example.prompt for example in prompts.completions]
    return prompts.prompts


def _response(facts: Facts, prompt: Prompt, text: str, sample: int) -> Rollout:
    """A finished response as an engine would return it; one that cannot be encoded is the stop token alone."""
    try:
        ids = facts.tokenizer.encode(text)
    except DataError:  # a tokenizer of few characters
        ids = []
    ids = [*ids, facts.tokenizer.eos_id]
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=np.asarray(ids, dtype=np.int32),
        rollout_logprobs=np.full(len(ids), -1.0, dtype=np.float32),
        finish_reason="stop",
        weight_versions=(0,),
        text=text,
    )
