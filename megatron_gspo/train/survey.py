"""Reference answers before training: what the reward cannot use is known before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.data.prompts import PromptSet
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import DataError
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.rewards.references import Graded, ReferenceCheck, Survey
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.types import Prompt

if TYPE_CHECKING:  # an evaluation by itself needs no Megatron
    from megatron_gspo.megatron.groups import Groups
    from megatron_gspo.train.inputs import Inputs


@dataclass(frozen=True)
class _Told:
    """What the first rank found, for all."""

    known: dict[str, dict[str, Graded]]
    """By source."""
    notes: list[str]


def survey_references(config: RunConfig, inputs: Inputs, groups: Groups) -> tuple[Inputs, list[str]]:
    """Grades references on the first rank, and tells the others: the inputs with what is known, and notes. Collective.

    Under ``data.skip_bad`` held-out prompts with an unusable reference are left out; those of training keep their
    place in the order, and others stand in for them when they are drawn. Raises DataError without it when a reference
    would end the run, RewardError when the reward fails on every one.
    """
    checks = {"": make_check(config, inputs.reward, inputs.tokenizer)}
    checks |= {name: make_check(config, reward, inputs.tokenizer) for name, reward in inputs.source_rewards.items()}
    sets = [(source.name, source.prompts, 1) for source in inputs.sources]
    sets = sets or [("", inputs.prompts, config.train.prompts_per_step)]
    if inputs.eval_prompts is not None and config.eval.every:
        sets.append(("", inputs.eval_prompts, 1))

    def look() -> _Told | None:
        if dist.get_rank() != 0 or not any(check.limit for check in checks.values()):
            return None
        notes = [note for name, part, needed in sets for note in _survey(config, checks[name], part, needed)]
        return _Told({name: check.known for name, check in checks.items()}, notes)

    told: _Told | None = broadcast_object(together(look, groups.world), 0, groups.world)
    if told is None:
        return inputs, []
    for name, check in checks.items():
        check.known = told.known[name]
    inputs = replace(inputs, references=checks)
    if config.data.skip_bad and inputs.eval_prompts is not None:
        inputs = replace(inputs, eval_prompts=without_bad(checks[""], inputs.eval_prompts))
    return inputs, told.notes


def make_check(config: RunConfig, reward: Reward, tokenizer: Tokenizer) -> ReferenceCheck:
    """What references are held against, as the configuration asks."""
    limit, seed = config.reward.check_references, config.train.seed
    return ReferenceCheck(reward, tokenizer.encode, tokenizer.eos_id, limit=limit, seed=seed)


def usable_questions(config: RunConfig, prompts: PromptSet, reward: Reward, tokenizer: Tokenizer) -> PromptSet:
    """An evaluation's prompts, those with an unusable reference left out under ``data.skip_bad``. Raises as
    ``survey_references`` does."""
    check = make_check(config, reward, tokenizer)
    if check.limit:
        _survey(config, check, prompts, 1)
    return without_bad(check, prompts) if config.data.skip_bad else prompts


def without_bad(check: ReferenceCheck, prompts: PromptSet) -> PromptSet:
    """The set without the prompts whose reference is known to be unusable."""
    found = {index: check.problem(check.key(prompt)) for index, prompt in enumerate(prompts.prompts)}
    return prompts.without({index: f"{prompts.place(index)}: {text}" for index, text in found.items() if text})


def judge_drawn(
    checks: Mapping[str, ReferenceCheck],
    prompts: PromptSet,
    drawn: Mapping[int, tuple[int, Prompt]],
    *,
    skip_bad: bool,
) -> dict[int, str]:
    """What is wrong with the references of drawn prompts, by position, with the place in the file; each source has its
    own check. Without ``skip_bad`` only what would end the run is: the rest has been said before."""
    found: dict[int, str] = {}
    for name in sorted({prompt.source for _, prompt in drawn.values()}):
        check = checks[name]
        own = {position: prompt for position, (_, prompt) in drawn.items() if prompt.source == name}
        problems = check.judge(own)
        found |= {at: text for at, text in problems.items() if skip_bad or check.is_fatal(own[at])}
    return {position: f"{prompts.place(drawn[position][0])}: {text}" for position, text in sorted(found.items())}


def _survey(config: RunConfig, check: ReferenceCheck, prompts: PromptSet, needed: int) -> list[str]:
    """What there is to say of one file's references, of which ``needed`` must be usable."""
    survey = check.survey(prompts.prompts, prompts.sample(check.limit, config.train.seed))
    if survey.error is not None:
        raise survey.error
    skip_bad = config.data.skip_bad
    if survey.fatal and not skip_bad:
        raise DataError(finding(prompts, survey, min(survey.fatal)) + f": {HELP}")
    left = len(prompts) - survey.bad_prompts
    if skip_bad and prompts.looked.whole and left < needed:
        raise DataError(
            f"{left} of {len(prompts)} prompts have a reference answer that the reward can use, fewer than {needed}: "
            f"{finding(prompts, survey, min(survey.problems))}"
        )
    if not survey.problems:
        return []
    consequence = "skipped when drawn" if skip_bad else "they are trained on all the same (data.skip_bad = false)"
    return [f"warning: {finding(prompts, survey, min(survey.problems))}; {survey.describe()}: {consequence}"]


HELP = "mend the row, set data.skip_bad = true, or reward.check_references = 0"


def finding(prompts: PromptSet, survey: Survey, index: int) -> str:
    """ "train.jsonl, line 13: the reference answer cannot be graded: ..."."""
    return f"{prompts.place(index)}: {survey.problems[index]}"
