"""R3 with a real SGLang server: its routes are the trainer's own at equal weights, and a run replays them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
import torch

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ReplayError
from megatron_gspo.megatron.groups import make_groups
from megatron_gspo.train.assembly import Run, build_run
from megatron_gspo.train.batch import place
from megatron_gspo.train.collect import Collected, collect_rollouts, score
from megatron_gspo.train.inputs import load_inputs
from megatron_gspo.train.routing import changes_between, coverage, open_routing
from megatron_gspo.train.step import outer_step, pi_old_pass
from tests.pool import RankError, RankPool
from tests.training.conftest import MakeConfig
from tests.training.test_runs import metrics_of, train


@dataclass
class Seen:
    """What one rank saw of an outer step's responses at the engine's weights."""

    routes_differ: int
    """Rows, of this rank's layers and tokens with a route, that the engine has otherwise, their order included."""
    routes: int
    logprob_error: float
    """Largest |log pi_old - log mu| of this rank's response tokens, with the engine's routes replayed."""
    mismatch: dict[str, float]
    coverage: float
    tokens: int
    sequences: int


def start(config: RunConfig) -> tuple[Run, Collected]:
    run = build_run(config, make_groups(config.parallel), load_inputs(config), config.rollout.servers)
    run.sync.push(run.policy.weights(), 0)
    survivors, dropped = collect_rollouts(run, dict(enumerate(run.prompts.prompts[: config.train.prompts_per_step])), 0)
    return run, score(run, survivors, dropped)


def see(config: RunConfig) -> Seen:
    run, collected = start(config)
    minibatches = place(collected.samples, config, run.groups)
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    samples = list(chain.from_iterable(part for minibatch in minibatches for part in minibatch.samples))
    routing = open_routing(run, collected.samples, minibatches, 0)
    assert routing.engine is not None
    minibatches = pi_old_pass(run, minibatches, routing)
    asked = list(chain.from_iterable(routing.engine))
    own = [shard for minibatch in minibatches for shard in minibatch.routes.old]
    differ = [
        ((a.experts_LTK != b.experts_LTK).any(dim=-1) & a.present_T).sum() for a, b in zip(asked, own, strict=True)
    ]
    errors = [0.0]
    for shard in chain.from_iterable(minibatch.shards for minibatch in minibatches):
        assert shard.old_logprobs_T is not None
        errors += (shard.old_logprobs_T - shard.rollout_logprobs_T)[shard.mask_T].abs().tolist()
    return Seen(
        routes_differ=int(sum(differ)),
        routes=int(sum(shard.present_T.sum() for shard in asked)) * len(run.policy.replay.layers),
        logprob_error=max(errors),
        mismatch=changes_between("m", asked, own, batches, run.groups),
        coverage=coverage(asked, batches, run.groups),
        tokens=sum(sample.length for sample in samples),
        sequences=len(samples),
    )


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "pipeline": 2}], ids=["one rank", "TP2xPP2"])
def test_the_engines_routes_are_the_trainers_own_at_equal_weights_and_give_the_engines_logprobs(
    ranks: RankPool, make_config: MakeConfig, parallel: dict[str, int]
) -> None:
    layout = [f"parallel.{name}={parallel.get(name, 1)}" for name in ("tensor", "pipeline", "expert")]
    config = make_config('replay.mode="r3"', "rollout.group_size=4", *layout)
    seen: list[Seen] = ranks.run(config.parallel.world_size(), see, config)
    first = seen[0]
    assert sum(rank.routes for rank in seen) == 4 * (first.tokens - first.sequences)
    assert [rank.routes_differ for rank in seen] == [0] * len(seen)
    assert max(rank.logprob_error for rank in seen) < 1e-5
    assert max(rank.logprob_error for rank in seen) > 0  # it was compared
    assert first.coverage == pytest.approx(1 - first.sequences / first.tokens, abs=1e-12)
    assert set(first.mismatch) == {"m", "m_tokens", *(f"m/layer_{layer:02d}" for layer in range(4))}
    assert set(first.mismatch.values()) == {0.0}


def test_a_run_replays_the_engines_routes_in_every_mini_batch(ranks: RankPool, make_config: MakeConfig) -> None:
    config = make_config('replay.mode="r3"', "optimizer.lr=3e-3")
    ranks.run(2, train, config)
    steps = [line for line in metrics_of(config) if line["step"] >= 0]
    assert len(steps) == 4
    drifts = [line["route/drift"] for line in steps]
    assert drifts[0] == drifts[2] == 0.0
    assert min(drifts[1], drifts[3]) > 0.0  # routers would have chosen others, had they not been overruled
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        assert 1 - 1 / config.rollout.max_prompt_tokens <= line["replay/coverage"] <= 1 - 1 / longest
        assert line["route/engine_mismatch"] < 1e-3  # float32 at equal weights: near-ties alone
        layers = [line[f"route/drift/layer_{layer:02d}"] for layer in range(4)]
        assert line["route/drift"] == pytest.approx(sum(layers) / 4)
        assert max(layers) <= line["route/drift_tokens"] <= 1
        assert abs(line["kl/engine_k3"]) < 1e-9
        assert (line["clip/frac_tokens"] == 0.0) == (line["minibatch"] == 0)


def test_with_replay_off_the_engine_is_asked_for_routes_every_few_outer_steps(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config("replay.engine_routes_every=2", "replay.drift_every=2", "train.outer_steps=3")
    ranks.run(2, train, config)
    steps = [line for line in metrics_of(config) if line["step"] >= 0]
    measured = {line["outer_step"] for line in steps if "route/engine_mismatch/layer_03" in line}
    drifted = {line["outer_step"] for line in steps if "route/drift" in line}
    assert measured == drifted == {0, 2}
    assert not any("replay/coverage" in line for line in steps)


def a_step_with_few_routes(config: RunConfig) -> list[torch.Tensor]:
    """The weights before and after an outer step whose routes were lost on the way."""
    run, _ = start(config)
    before = [parameter.detach().clone() for parameter in run.policy.chunks[0].parameters()]

    async def without_routes(*args: object, **more: object) -> list[object]:
        groups = await draw(*args, **more)  # type: ignore[arg-type]
        return [
            [rollout if rollout.sample else replace(rollout, routes=rollout.routes[:3]) for rollout in group]
            for group in groups
        ]

    draw = run.engine.rollout_groups
    run.engine.rollout_groups = without_routes  # type: ignore[method-assign, assignment]
    try:
        outer_step(run, 0, first_step=0)
    except ReplayError:
        after = list(run.policy.chunks[0].parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the optimizer has moved"
        raise
    return []


def test_too_few_routes_stop_the_step_before_the_optimizer_moves(ranks: RankPool, make_config: MakeConfig) -> None:
    config = make_config('replay.mode="r3"', "rollout.group_size=2", "parallel.tensor=1", "parallel.expert=1")
    with pytest.raises(RankError, match=r"routes for \d+ of \d+ tokens \(5\d\.\d%\), below replay.min_coverage = 0.9"):
        ranks.run(1, a_step_with_few_routes, config)
    assert np.isfinite(ranks.run(1, lenient, config)).all()


def lenient(config: RunConfig) -> list[float]:
    """The metrics of that step when few routes are enough."""
    config = config.model_copy(update={"replay": config.replay.model_copy(update={"min_coverage": 0.5})})
    run, collected = start(config)
    samples = [s if s.sample else replace(s, routes=None) for s in collected.samples]
    minibatches = place(samples, config, run.groups)
    minibatches = pi_old_pass(run, minibatches, open_routing(run, samples, minibatches, 0))
    return [float(shard.old_logprobs_T.sum()) for minibatch in minibatches for shard in minibatch.shards]
