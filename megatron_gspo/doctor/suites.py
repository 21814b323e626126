"""The check of the suites that a run evaluates on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.suites.catalog import read_all_asked
from megatron_gspo.train.suite_inputs import load_suites


def check_suites(facts: Facts) -> Sequence[Check]:
    """Every suite of ``eval.suites`` known, its files read, its prompts rendered."""
    settings = facts.config.eval
    if not settings.suites:
        return [ok("eval.suites is empty: none are asked")]
    try:
        read_all_asked(settings.suites)
    except MegatronGspoError as caught:
        return [error(str(caught), "eval.suites")]
    if not settings.suites_every:
        return [warning("they are never asked: eval.suites_every = 0", "eval.suites_every, or an empty eval.suites")]
    checks = []
    for task in load_suites(facts.config, facts.tokenizer):
        task.reward.close()
        text = f"{task.name}: {len(task.prompts)} problems x {task.sampling.group_size} responses"
        text += f" of at most {task.sampling.max_tokens} tokens, every {settings.suites_every} outer steps"
        checks.append(warning("; ".join((text, *task.warnings)), "the files") if task.warnings else ok(text))
    return checks
