"""From prompts to samples: responses of the engine, their rewards, and the advantages that these give."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from megatron_gspo.algorithm.advantages import (
    batch_advantages,
    centred_advantages,
    group_advantages,
    leave_one_out_advantages,
    token_group_advantages,
)
from megatron_gspo.algorithm.base import Credit
from megatron_gspo.algorithm.metrics import rollout_metrics
from megatron_gspo.parallel.exchange import agree, gather_objects, together
from megatron_gspo.policy.groups import Groups
from megatron_gspo.rewards.scoring import GroupRewards, score_now
from megatron_gspo.rollout.engine import Sampling
from megatron_gspo.rollout.policy import Dropped, apply_policies, zero_truncated
from megatron_gspo.train.context import Run
from megatron_gspo.train.draw import skip_notes, take_usable
from megatron_gspo.train.survey import judge_drawn
from megatron_gspo.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    Sample,
)

BY_GROUP: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group": group_advantages,
    "centred": centred_advantages,
    "leave-one-out": leave_one_out_advantages,
}
"""``algorithm.credit`` that looks at one group at a time."""


@dataclass
class Collected:
    """What one data-parallel leader brought home; empty on other ranks."""

    groups: dict[int, RolloutGroup] = field(default_factory=dict)
    """Position among the outer step's prompts -> its group."""
    advantages: dict[int, np.ndarray] = field(default_factory=dict)
    """Position -> [G_p] float64."""
    samples: list[Sample] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)
    stopped: int = 0
    """Responses whose grading took too long."""


def draw_prompts(run: Run, number: int) -> tuple[list[Prompt], dict[str, float]]:
    """The outer step's prompts, on every rank, and the metric of those that were skipped, under ``data.skip_bad``.
    Collective."""
    count, skip_bad, groups = run.config.train.prompts_per_step, run.config.data.skip_bad, run.groups

    def judge(drawn: Mapping[int, tuple[int, Prompt]]) -> dict[int, str]:
        if run.references is None or not groups.is_leader:
            return {}
        mine = {position: pair for position, pair in drawn.items() if position % groups.data_size == groups.data_rank}
        return judge_drawn(run.references, run.prompts, mine, skip_bad=skip_bad)

    drawn = take_usable(
        run.cursor,
        count,
        run.prompts.prompts.__getitem__,
        groups.world,
        mine=range(count),
        skip_bad=skip_bad,
        judge=judge,
    )
    run.notes.extend(skip_notes(number, drawn.skipped))
    prompts = number_visits([drawn.items[position] for position in range(count)])
    return prompts, {"data/skipped": float(len(drawn.skipped))} if skip_bad else {}


def number_visits(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, each that was among those before it with its number of visits."""
    seen: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, visit=seen[prompt.id]) if seen[prompt.id] else prompt)
        seen[prompt.id] += 1
    return numbered


def collect_rollouts(run: Run, prompts: Sequence[Prompt], number: int) -> tuple[dict[int, list[Rollout]], Dropped]:
    """Each leader draws the responses of its share of the prompts. Collective: a failure reaches every rank."""
    error: Exception | None = None
    survivors: dict[int, list[Rollout]] = {}
    dropped = Dropped()
    if run.groups.is_leader:
        mine = prompts[run.groups.data_rank :: run.groups.data_size]
        try:
            drawn = asyncio.run(draw(run, mine, run.sampling(number), number)) if mine else []
            positions = range(run.groups.data_rank, len(prompts), run.groups.data_size)
            for position, group in zip(positions, drawn, strict=True):
                kept, counts = apply_policies([group], run.config.rollout)
                dropped = dropped + counts
                if kept:
                    (survivors[position],) = kept
        except Exception as caught:
            error = caught
    agree(error, run.groups.world)
    return survivors, dropped


async def draw(run: Run, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[list[Rollout]]:
    """All responses of this leader's prompts, by group."""
    async with run.engine as engine:
        return await engine.rollout_groups(prompts, sampling, weight_version=weight_version)


def score(run: Run, survivors: dict[int, list[Rollout]], dropped: Dropped) -> Collected:
    """Rewards and advantages of this leader's groups. Collective: a failing reward reaches every rank."""
    collected = Collected(dropped=dropped)
    error: Exception | None = None
    try:
        rewards = score_now(run.reward, list(survivors.values())) if survivors else []
        for (position, rollouts), scored in zip(survivors.items(), rewards, strict=True):
            collected.groups[position] = _group(run, rollouts, scored)
            collected.stopped += scored.stopped
    except Exception as caught:
        error = caught
    agree(error, run.groups.world)
    collected.advantages = give_credit(run.config.algorithm.credit, collected.groups, run.groups)
    for position, group in collected.groups.items():
        collected.samples += samples_of(position, group, collected.advantages[position])
    return collected


def give_credit(credit: Credit, groups: Mapping[int, RolloutGroup], ranks: Groups) -> dict[int, np.ndarray]:
    """Position -> [G_p] advantages of this leader's groups. Collective: a batch's statistics are of all leaders."""
    if credit in BY_GROUP:
        return together(lambda: {at: BY_GROUP[credit](group.rewards_G) for at, group in groups.items()}, ranks.world)
    mine = {
        position: (group.rewards_G, np.array([len(rollout.response_ids) for rollout in group.rollouts]))
        for position, group in groups.items()
    }
    every = {position: row for part in gather_objects(mine, ranks.world) for position, row in part.items()}
    positions = sorted(every)
    if not positions:
        return {}
    rewards, lengths = zip(*(every[position] for position in positions), strict=True)
    advantages = batch_advantages(rewards, lengths, baseline=credit == "group-then-batch")
    return {position: a for position, a in zip(positions, advantages, strict=True) if position in groups}


def _group(run: Run, rollouts: list[Rollout], scored: GroupRewards) -> RolloutGroup:
    algorithm = run.config.algorithm
    rewards_G = np.array(zero_truncated(rollouts, scored.rewards_G, run.config.rollout))
    token_rewards_G = None
    if scored.token_rewards_G is not None:
        token_rewards_G = zero_truncated(rollouts, scored.token_rewards_G, run.config.rollout)
        if not algorithm.per_token or algorithm.credit != "group":
            taken = algorithm.name if not algorithm.per_token else f'algorithm.credit = "{algorithm.credit}"'
            warn_once(
                f"the reward {run.reward.name} gives one value a token, and {taken} takes their mean: see gspo-token"
            )
            token_rewards_G = None
    return RolloutGroup(rollouts[0].prompt, tuple(rollouts), rewards_G, token_rewards_G)


def samples_of(position: int, group: RolloutGroup, advantages_G: np.ndarray) -> list[Sample]:
    """What a group gives to train on, at its position among the outer step's prompts."""
    token_advantages_G: Sequence[np.ndarray]
    if group.token_rewards_G is not None:
        token_advantages_G = token_group_advantages(group.token_rewards_G)
    else:
        pairs = zip(group.rollouts, advantages_G, strict=True)
        token_advantages_G = [np.full(len(rollout.response_ids), advantage) for rollout, advantage in pairs]
    return [
        Sample.of_response(
            np.asarray(rollout.prompt.token_ids),
            rollout.response_ids,
            group=position,
            sample=rollout.sample,
            rollout_logprobs=rollout.rollout_logprobs,
            advantage=float(advantage),
            token_advantages=token_advantages,
            reward=float(reward),
            routes=rollout.routes,
        )
        for rollout, reward, advantage, token_advantages in zip(
            group.rollouts, group.rewards_G, advantages_G, token_advantages_G, strict=True
        )
    ]


@functools.cache
def warn_once(text: str) -> None:
    """A line on the terminal, once a process."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def summarise(run: Run, collected: Collected) -> dict[str, float]:
    """The rollout metrics of the outer step over all leaders; on every rank. Collective."""
    mine = [
        (
            group.rewards_G,
            collected.advantages[position],
            np.array([len(rollout.response_ids) for rollout in group.rollouts]),
            np.array([rollout.truncated for rollout in group.rollouts]),
        )
        for position, group in sorted(collected.groups.items())
    ]
    parts = gather_objects((mine, collected.dropped, collected.stopped), run.groups.world)
    rows = [row for rows, _, _ in parts for row in rows]
    dropped = sum((part for _, part, _ in parts), Dropped())
    rewards, advantages, lengths, truncated = ([row[column] for row in rows] for column in range(4))
    kinds = {f"dropped/{kind}": float(count) for kind, count in asdict(dropped).items()}
    stopped = {"reward/grader_timeouts": float(sum(count for _, _, count in parts))}
    return rollout_metrics(rewards, advantages, lengths, truncated, dropped.responses) | kinds | stopped
