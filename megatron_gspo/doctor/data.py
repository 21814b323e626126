"""Checks of the prompts and of the reward."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_gspo.config import RunConfig
from megatron_gspo.data.prompts import PromptSet
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.lengths import check_lengths
from megatron_gspo.doctor.tokenizer import show_prompt
from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.rewards.interface import RewardContext
from megatron_gspo.rewards.references import MADE_UP, ReferenceCheck, Survey, as_response
from megatron_gspo.rewards.registry import check_reward as check_settings
from megatron_gspo.rewards.scoring import score_now
from megatron_gspo.train.reward import find_reward, may_ask_own_servers

FEWEST_EVAL = 512
"""Held-out prompts below which an accuracy's standard error exceeds 2.2% (sqrt(0.25 / 512))."""


def check_prompts(facts: Facts) -> list[Check]:
    """The prompts well-formed, as far as they are looked at before training, enough of them, and none too long; the
    first of them as the model reads it."""
    config = facts.config
    try:
        prompts = facts.prompts
    except DataError as caught:
        return [error(str(caught), _field_fix(config, str(caught), _setting_of(config, str(caught))))]
    looked, rows = prompts.looked, len(prompts)
    text = f"{_named(config, facts)}: {rows} prompts, {config.train.prompts_per_step} a step, read as {looked.format!r}"
    if not looked.whole:
        text += f"; {looked.rows} rows looked at, the others are when they are drawn"
    if prompts.skipped:
        text += f"; {prompts.skipped} of {looked.rows} rows skipped ({prompts.problems[0]})"
    first = prompts.prompts[0] if isinstance(prompts, PromptSet) else prompts.completions[0].prompt
    return [_enough(facts, text, rows), *check_lengths(facts, prompts), show_prompt(facts.tokenizer, first)]


def check_eval_prompts(facts: Facts) -> Check:
    """The held-out prompts, read as an evaluation reads them."""
    config = facts.config
    path, every, wanted = config.data.eval_path, config.eval.every, config.eval.prompts
    if facts.supervised:
        return ok("supervised fine-tuning does not evaluate")
    if not path:
        return ok("data.eval_path is empty: no evaluation on prompts of it")
    if not every:
        return warning(f"{path} is never read: eval.every = 0", "eval.every, or an empty data.eval_path")
    try:
        prompts = facts.read_prompts(path, wanted)
    except DataError as caught:
        return error(str(caught), _field_fix(config, str(caught), "data.eval_path"))
    rows, used = prompts.looked.total, len(prompts)
    text = f"{path}: {rows} prompts, {used} used (eval.prompts = {wanted}), every {every} outer steps"
    tokens, limit = prompts.looked.prompt_tokens, config.rollout.max_prompt_tokens
    longest, over = max(tokens), sum(count > limit for count in tokens)
    if over == len(tokens):  # to skip them would leave nothing
        return error(f"{text}; all have more than {limit} tokens", f"rollout.max_prompt_tokens = {longest}")
    if over and not config.data.skip_bad:
        return error(f"{text}; one has {longest} tokens", f"rollout.max_prompt_tokens = {longest}, or data.skip_bad")
    if used < FEWEST_EVAL:
        percent = 100 * 1.96 * (0.25 / used) ** 0.5
        fix = f"eval.prompts = {FEWEST_EVAL}" if rows >= FEWEST_EVAL else f"a data.eval_path of {FEWEST_EVAL} prompts"
        if wanted < FEWEST_EVAL and rows < FEWEST_EVAL:
            fix = f"eval.prompts = {FEWEST_EVAL}, and {fix}"
        return warning(f"{text}: an accuracy of 50% is known to +-{percent:.2g}%", fix)
    return ok(text)


def check_reward(facts: Facts) -> list[Check]:
    """Found, called on one prompt (with the reference answer as the response, and with a made-up one), and on the
    other references."""
    config, prompts = facts.config, facts.prompts
    if not isinstance(prompts, PromptSet):
        return [ok("supervised fine-tuning has no reward")]
    if not facts.sources:
        return _check_reward(facts, config, prompts)
    checks = []
    for source, read in zip(config.data.sources, facts.sources, strict=True):
        own = config.model_copy(update={"reward": source.reward_config(config.reward)})
        try:
            found = _check_reward(facts, own, read.prompts)
        except ConfigError as caught:
            found = [error(str(caught), f"data.sources.{source.name}.reward")]
        checks += [replace(check, detail=f"source {source.name}: {check.detail}") for check in found]
    return sorted(checks, key=lambda check: check.status == "ok")


def _check_reward(facts: Facts, config: RunConfig, prompts: PromptSet) -> list[Check]:
    """The reward of one set of prompts."""
    if config.reward_server.model and may_ask_own_servers(config.reward):
        check_settings(config.reward, RewardContext.of(config))
        return [
            ok(f"{config.reward.function}: its servers are started with the run (reward_server), and not asked now")
        ]
    reward, tokenizer = find_reward(config, facts.tokenizer), facts.tokenizer
    limit, seed = config.reward.check_references, config.train.seed
    check = ReferenceCheck(reward, tokenizer.encode, tokenizer.eos_id, limit=limit, seed=seed)
    survey = check.survey(prompts.prompts, prompts.sample(check.limit, seed))
    if survey.error is not None:
        raise survey.error
    found = _references(facts, prompts, survey)
    if survey.problems and 0 in survey.problems:  # its one call would be the first of them
        return found
    prompt = prompts.prompts[0]
    texts = (prompt.answer or MADE_UP, MADE_UP)
    rollouts = [as_response(prompt, text, tokenizer.encode, tokenizer.eos_id, i) for i, text in enumerate(texts)]
    (scored,) = score_now(reward, [rollouts])
    reward.close()
    if reasons := [reason for reason in scored.ungraded_G if reason]:
        return [*found, error(f"{reward.name} graded nothing: {reasons[0]}", "what reward.options name")]
    right, wrong = scored.rewards_G.tolist()
    text = f"{reward.name} on prompt {prompt.id!r}: {right:g} for its reference answer, {wrong:g} for {MADE_UP!r}"
    if scored.token_rewards_G is not None and not config.algorithm.per_token:
        text += f"; it gives one reward a token, and {config.algorithm.name} takes their mean"
        return [*found, warning(text, 'algorithm.name = "gspo-token"')]
    return sorted([ok(text), *found], key=lambda check: check.status == "ok")


def _references(facts: Facts, prompts: PromptSet, survey: Survey) -> list[Check]:
    """What was found among the references; nothing to say where none was graded."""
    if not survey.looked_at or not survey.distinct:
        return []
    text = survey.describe()
    if survey.graded < survey.distinct or not prompts.looked.whole:
        text += "; the others are when they are drawn"
    if not survey.problems:
        return [ok(text)]
    worst = min(survey.fatal or survey.problems)
    text = f"{prompts.place(worst)}: {survey.problems[worst]}; {text}"
    if len(survey.problems) == survey.graded and survey.graded in (survey.distinct, max(survey.graded, 4)):
        return [error(f"{text}: not one is usable", _other_references(facts))]  # no row is at fault
    left, step = survey.looked_at - survey.bad_prompts, facts.config.train.prompts_per_step
    if facts.config.data.skip_bad and prompts.looked.whole and left < step:
        text = f"{text}: the {left} that are left are fewer than train.prompts_per_step = {step}"
        return [error(text, "the rows, or a smaller train.prompts_per_step")]
    if facts.config.data.skip_bad:
        return [warning(f"{text}: skipped when drawn", "the rows")]
    if survey.fatal:
        return [error(f"{text}: its turn would end the run", "the rows, or data.skip_bad = true")]
    return [warning(text, "the rows, or data.skip_bad = true")]


def _enough(facts: Facts, text: str, rows: int) -> Check:
    config = facts.config
    step = config.train.prompts_per_step
    if rows < step:
        return error(f"{text}: one would be drawn twice in a step", _more_prompts(facts, rows, step))
    if config.data.sources:  # each has epochs of its own
        return ok(text)
    epochs = config.train.outer_steps * step / rows
    return ok(f"{text}, {epochs:.2g} epochs in {config.train.outer_steps} outer steps")


def _named(config: RunConfig, facts: Facts) -> str:
    """The file of the training prompts; of sources, each with its prompts, its share of those that are drawn, and how
    often it comes round."""
    if not config.data.sources:
        return config.data.path
    total, steps = sum(source.weight for source in facts.sources), config.train.outer_steps
    parts = []
    for source in facts.sources:
        share = source.weight / total
        epochs = share * steps * config.train.prompts_per_step / len(source.prompts)
        parts.append(f"{source.name} {len(source.prompts)} ({share:.0%} of those drawn, {epochs:.2g} epochs)")
    return f"data.sources, in {steps} outer steps: {', '.join(parts)}"


def _setting_of(config: RunConfig, problem: str) -> str:
    """The setting that names the file which a problem is about."""
    return next((name for name, path in config.data.paths.items() if problem.startswith(path)), "data.path")


def _field_fix(config: RunConfig, problem: str, file: str) -> str:
    """The setting that names a field which is not there, where one does; else the file."""
    named = re.search(r"the field '(.+?)' is missing", problem)
    for setting in ("prompt_field", "answer_field", "completion_field") if named else ():
        if named and getattr(config.data, setting) == named[1]:
            return f"data.{setting}"
    if named and named[1] == "completion":
        return f"data.completion_field, or {file}"
    return f"data.prompt_field, or {file}" if "data.prompt_field names" in problem else file


def _more_prompts(facts: Facts, rows: int, step: int) -> str:
    """What keeps a step from having prompts enough."""
    config, looked = facts.config, facts.prompts.looked
    fewer = f"train.prompts_per_step <= {rows}"
    if config.data.limit is not None and looked.total >= step > config.data.limit:
        return f"data.limit = {step} or more (the file has {looked.total} rows), or {fewer}"
    if facts.prompts.skipped and looked.total >= step:
        return f"the {facts.prompts.skipped} rows that data.skip_bad leaves out, or {fewer}"
    return f"{fewer}, or more prompts in data.path"


def _other_references(facts: Facts) -> str:
    config = facts.config
    fields = "data.answer_field" if config.data.answer_field else "data.answer_field (another field holds the answers)"
    return f"{fields}, or reward.function (now {config.reward.function!r})"
