"""From prompts to samples: responses of the engine, their rewards, and the advantages that these give."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from megatron_gspo.algorithm.advantages import BY_GROUP, credit_by_response, is_zero_variance, token_group_advantages
from megatron_gspo.algorithm.base import ALONE, Algorithm, Credit
from megatron_gspo.algorithm.metrics import rollout_metrics
from megatron_gspo.errors import NoServerError, RewardError
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import agree, gather_objects, together
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rewards.scoring import GroupRewards, score_now
from megatron_gspo.rollout.accounts import check_answered, check_complete
from megatron_gspo.rollout.engine import Sampling
from megatron_gspo.rollout.survivors import Dropped, apply_policies, shape_overlong, without_ungraded, zero_truncated
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.clock import Clock
from megatron_gspo.train.draw import skip_notes, take_usable
from megatron_gspo.train.outcomes import curriculum_metrics, passed_over, source_metrics, tell_curriculum
from megatron_gspo.train.survey import judge_drawn
from megatron_gspo.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    Sample,
)


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
    asked: int = 0
    """Responses that were given to the grader."""
    reason: str = ""
    """Why the first ungraded one was not graded."""


def collect(run: Run, number: int, clock: Clock) -> tuple[Collected, dict[str, float]]:
    """The outer step's prompts, their graded responses, and the metrics of how they were drawn. Collective.

    Under ``rollout.dynamic_sampling`` (DAPO, arXiv 2503.14476, section 3.2) the place of a group that teaches nothing,
    since its rewards are all equal or its responses were dropped, is drawn anew from the prompts that follow in the
    order, so many times at most. What the last time brings stays.
    """
    limit, places = run.config.rollout.dynamic_sampling, list(range(run.config.train.prompts_per_step))
    collected, visits = Collected(), Counter[str]()
    skipped = asked = rounds = 0
    passed = passed_over(run)
    while True:
        prompts, indices, bad = draw_prompts(run, number, places, visits)
        skipped, asked = skipped + bad, asked + len(prompts)
        with clock("rollout"):
            survivors, dropped = collect_rollouts(run, prompts, number)
        with clock("reward"):
            grade(run, survivors, dropped, collected)
        tell_curriculum(run, collected.groups, indices)
        places = without_variance(collected.groups, places, run.groups) if limit else []
        if not places or rounds == limit:
            break
        rounds += 1
        for place in places:
            collected.groups.pop(place, None)
    metrics = {"data/skipped": float(skipped)} if run.config.data.skip_bad else {}
    metrics |= curriculum_metrics(run, passed)
    if limit:
        metrics |= {"dynamic/rounds": float(rounds), "dynamic/drawn": float(asked), "dynamic/left": float(len(places))}
    with clock("reward"):
        give(run, collected)
    return collected, metrics


def without_variance(groups: Mapping[int, RolloutGroup], places: Sequence[int], ranks: Groups) -> list[int]:
    """Those of the places, over all leaders, whose group is missing or has rewards that are all equal. Collective."""
    mine = [place for place, group in groups.items() if not is_zero_variance(group.rewards_G)]
    sound = {place for part in gather_objects(mine, ranks.world) for place in part}
    return [place for place in places if place not in sound]


def draw_prompts(
    run: Run, number: int, places: Sequence[int], visits: Counter[str]
) -> tuple[dict[int, Prompt], dict[int, int], int]:
    """The next prompts of the order for these places of the outer step, on every rank, each one's index among the
    prompts, and how many bad ones were skipped, under ``data.skip_bad``. Collective.

    ``visits``: how often the outer step has drawn each prompt so far, by id; counts on.
    """
    skip_bad, groups = run.config.data.skip_bad, run.groups

    def judge(drawn: Mapping[int, tuple[int, Prompt]]) -> dict[int, str]:
        if run.references is None or not groups.is_leader:
            return {}
        mine = {at: pair for at, pair in drawn.items() if places[at] % groups.data_size == groups.data_rank}
        return judge_drawn(run.references, run.prompts, mine, skip_bad=skip_bad)

    drawn = take_usable(
        run.cursor,
        len(places),
        run.prompts.prompts.__getitem__,
        groups.world,
        mine=range(len(places)),
        skip_bad=skip_bad,
        judge=judge,
    )
    run.notes.extend(skip_notes(number, drawn.skipped))
    prompts = number_visits([drawn.items[at] for at in range(len(places))], visits)
    indices = {place: drawn.indices[at] for at, place in enumerate(places)}
    return dict(zip(places, prompts, strict=True)), indices, len(drawn.skipped)


def number_visits(prompts: Sequence[Prompt], seen: Counter[str]) -> list[Prompt]:
    """The prompts, each that was seen before, or is among those before it, with its number of visits."""
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, visit=seen[prompt.id]) if seen[prompt.id] else prompt)
        seen[prompt.id] += 1
    return numbered


def collect_rollouts(run: Run, prompts: Mapping[int, Prompt], number: int) -> tuple[dict[int, list[Rollout]], Dropped]:
    """Each leader draws the responses of its share of the prompts, which are by place in the outer step. Collective: a
    failure reaches every rank. Raises NoServerError when no server is left."""
    error: Exception | None = None
    survivors: dict[int, list[Rollout]] = {}
    dropped = Dropped()
    least = fewest(run.config.algorithm)
    size, rank = run.groups.data_size, run.groups.data_rank
    get_ready(run, number)
    drawn: dict[int, list[Rollout]] = {}
    if run.groups.is_leader:
        mine = {place: prompt for place, prompt in prompts.items() if place % size == rank}
        before = sum(place % size < rank for place in prompts)
        try:
            groups = asyncio.run(draw(run, list(mine.values()), run.sampling(number), number, before)) if mine else []
            drawn = dict(zip(mine, groups, strict=True))
            check_complete(mine, drawn, run.config.rollout.group_size)
            for place, group in drawn.items():
                kept, counts = apply_policies([group], run.config.rollout, least=least)
                dropped = dropped + counts
                if kept:
                    (survivors[place],) = kept
        except Exception as caught:
            error = caught
    run.fleet.hear(run.engine)
    agree(error, run.groups.world)
    check_answered(prompts, gather_objects(tuple(drawn), run.groups.world))
    return survivors, dropped


def get_ready(run: Run, version: int) -> None:
    """Servers that hold ``version``, for this leader's engine to ask. Collective. Raises NoServerError."""
    if not run.ready(version):
        raise NoServerError(run.fleet.why_none)
    run.engine.serve(run.fleet.up)


async def draw(
    run: Run, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int, before: int = 0
) -> list[list[Rollout]]:
    """All responses of this leader's prompts, by group. ``before``: prompts of the leaders before it."""
    async with run.engine as engine:
        return await engine.rollout_groups(prompts, sampling, weight_version=weight_version, first=before)


def score(run: Run, survivors: dict[int, list[Rollout]], dropped: Dropped) -> Collected:
    """Rewards and advantages of this leader's groups. Collective: a failing reward reaches every rank."""
    collected = Collected()
    grade(run, survivors, dropped, collected)
    give(run, collected)
    return collected


def grade(run: Run, survivors: dict[int, list[Rollout]], dropped: Dropped, collected: Collected) -> None:
    """Adds this leader's groups with their rewards. Collective: a failing reward reaches every rank.

    A response that was not graded leaves its group, whose advantages are then what they would be without it. Raises
    RewardError for too many of them.
    """
    error: Exception | None = None
    collected.dropped = collected.dropped + dropped
    try:
        for reward, places in by_reward(run, survivors):
            scores = score_now(reward, [survivors[place] for place in places])
            for place, scored in zip(places, scores, strict=True):
                keep_graded(run, place, survivors[place], scored, collected)
    except Exception as caught:
        error = caught
    agree(error, run.groups.world)
    check_ungraded(run, collected)


def by_reward(run: Run, survivors: Mapping[int, Sequence[Rollout]]) -> list[tuple[Reward, list[int]]]:
    """Each reward with the places of the groups that it grades."""
    rewards: dict[int, tuple[Reward, list[int]]] = {}
    for place, rollouts in survivors.items():
        reward = run.reward_of(rollouts[0].prompt)
        rewards.setdefault(id(reward), (reward, []))[1].append(place)
    return list(rewards.values())


def keep_graded(run: Run, place: int, rollouts: Sequence[Rollout], scored: GroupRewards, collected: Collected) -> None:
    """Adds what of a group has rewards, where enough of it has, and counts the rest."""
    graded, least = scored.graded, fewest(run.config.algorithm)
    collected.asked += len(rollouts)
    collected.stopped += scored.stopped
    collected.reason = collected.reason or next(filter(None, scored.ungraded_G), "")
    collected.dropped = collected.dropped + without_ungraded(len(graded), len(rollouts), least=least)
    if len(graded) >= least:
        collected.groups[place] = _group(run, [rollouts[i] for i in graded], scored.of(graded))


def check_ungraded(run: Run, collected: Collected) -> None:
    """Raises RewardError when more of the outer step's responses than ``reward.max_ungraded`` were not graded.
    Collective."""
    mine = (collected.dropped.ungraded, collected.asked, collected.reason)
    parts = gather_objects(mine, run.groups.world)
    ungraded, asked = sum(part[0] for part in parts), sum(part[1] for part in parts)
    if ungraded > run.reward.max_ungraded * asked:
        first = next(part[2] for part in parts if part[2])
        raise RewardError(
            f"reward {run.reward_names} left {ungraded} of {asked} responses ungraded, more than a share of "
            f"{run.reward.max_ungraded:g} (reward.max_ungraded); the first: {first}"
        )


def fewest(algorithm: Algorithm) -> int:
    """Responses that a group must have left to be trained on."""
    return 1 if algorithm.credit in ALONE else 2


def give(run: Run, collected: Collected) -> None:
    """Advantages of all groups, and the samples that they give. Collective."""
    collected.groups = dict(sorted(collected.groups.items()))
    collected.advantages = advantages_of(run.config.algorithm.credit, collected.groups, run.groups)
    for place, group in collected.groups.items():
        masked = {r.sample for r in group.rollouts if r.truncated and run.config.rollout.on_truncated == "mask"}
        made = samples_of(place, group, collected.advantages[place], by_token=not run.config.algorithm.uses_critic)
        collected.samples += [sample for sample in made if sample.sample not in masked]


def advantages_of(credit: Credit, groups: Mapping[int, RolloutGroup], ranks: Groups) -> dict[int, np.ndarray]:
    """Position -> [G_p] advantages of this leader's groups. Collective: a batch's statistics are of all leaders."""
    rewards = {position: group.rewards_G for position, group in groups.items()}
    lengths = {at: np.array([len(rollout.response_ids) for rollout in g.rollouts]) for at, g in groups.items()}
    if credit not in BY_GROUP:
        parts = gather_objects((rewards, lengths), ranks.world)
        rewards, lengths = ({at: row for part in parts for at, row in part[which].items()} for which in range(2))
    given = together(lambda: credit_by_response(credit, rewards, lengths), ranks.world)
    return {position: given[position] for position in groups}


def _group(run: Run, rollouts: list[Rollout], scored: GroupRewards) -> RolloutGroup:
    algorithm = run.config.algorithm
    shaped = run.config.rollout
    rewards_G = np.array(shape_overlong(rollouts, zero_truncated(rollouts, scored.rewards_G, shaped), shaped))
    token_rewards_G = None
    if scored.token_rewards_G is not None:
        token_rewards_G = shape_overlong(rollouts, zero_truncated(rollouts, scored.token_rewards_G, shaped), shaped)
        if problem := _without_token_rewards(algorithm):
            warn_once(
                f"the reward {run.reward_of(rollouts[0].prompt).name} gives one value a token, and {problem} takes "
                f"their mean: see gspo-token"
            )
            token_rewards_G = None
    return RolloutGroup(rollouts[0].prompt, tuple(rollouts), rewards_G, token_rewards_G, scored.components_G)


def _without_token_rewards(algorithm: Algorithm) -> str:
    """What makes an algorithm take the mean of a response's token rewards; "" where it gives credit by token."""
    if not algorithm.per_token:
        return algorithm.name
    if algorithm.credit not in ("group", "gae"):
        return f'algorithm.credit = "{algorithm.credit}"'
    return "algorithm.kl_reward_coef" if algorithm.kl_reward_coef and not algorithm.uses_critic else ""


def samples_of(position: int, group: RolloutGroup, advantages_G: np.ndarray, *, by_token: bool = True) -> list[Sample]:
    """What a group gives to train on, at its position among the outer step's prompts.

    ``by_token``: rewards per token give advantages per token, within the group.
    """
    token_advantages_G: Sequence[np.ndarray]
    token_rewards_G = group.token_rewards_G or [None] * len(group.rollouts)
    if group.token_rewards_G is not None and by_token:
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
            token_rewards=token_rewards,
            routes=rollout.routes,
        )
        for rollout, reward, token_rewards, advantage, token_advantages in zip(
            group.rollouts, group.rewards_G, token_rewards_G, advantages_G, token_advantages_G, strict=True
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
    tables = [table for group in collected.groups.values() for table in group.components_G]
    parts = gather_objects((mine, collected.dropped, collected.stopped, sums_of(tables)), run.groups.world)
    rows = [row for part in parts for row in part[0]]
    dropped = sum((part[1] for part in parts), Dropped())
    rewards, advantages, lengths, truncated = ([row[column] for row in rows] for column in range(4))
    kinds = {f"dropped/{kind}": float(count) for kind, count in asdict(dropped).items()}
    stopped = {"reward/grader_timeouts": float(sum(part[2] for part in parts))}
    found = rollout_metrics(rewards, advantages, lengths, truncated, dropped.responses)
    found |= source_metrics(run, collected.groups)
    return found | kinds | stopped | component_means([part[3] for part in parts]) | run.fleet.metrics()


def sums_of(tables: Iterable[Mapping[str, float]]) -> dict[str, tuple[float, int]]:
    """Name -> the sum of a component over the responses that have it, and their number."""
    sums: dict[str, tuple[float, int]] = {}
    for table in tables:
        for name, value in table.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value, count + 1
    return sums


def component_means(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """``reward/component/NAME`` -> the mean over all leaders' responses that have it."""
    names = sorted({name for part in parts for name in part})
    totals = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        f"reward/component/{name}": sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        for name, pairs in totals.items()
    }
