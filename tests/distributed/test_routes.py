"""Each rank gets the engine's routes of its own layers and tokens: those, all of those, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_gspo.errors import ReplayError
from megatron_gspo.types import PlacedSample, RouteShape, RouteShard, Sample
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

SHAPE = RouteShape(moe_layers=(False, True, True, True, True), top_k=3, num_experts=300)
GROUPS, SIZE = 4, 2
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "CP2": (2, {"context": 2}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2xCP2xPP2": (8, {"tensor": 2, "context": 2, "pipeline": 2}),
    "TP2xPP2xDP2": (8, {"tensor": 2, "pipeline": 2}),
}


def experts_of(token: int) -> np.ndarray:
    """[L, K]: a route that says whose it is. A token's id is its own in the whole outer step."""
    return (token * 7 + np.arange(5)[:, None] * 31 + np.arange(3)) % SHAPE.num_experts


def a_sample(group: int, index: int) -> Sample:
    prompt, response = 3 + group, 2 + 3 * index
    ids = 100 * group + 50 * index + np.arange(prompt + response, dtype=np.int32)
    rows = [experts_of(token) for token in ids[:-1]]
    if (group, index) == (2, 0):
        rows = rows[:4]  # a capture that was cut
    return Sample.of_response(
        group=group,
        sample=index,
        prompt_ids=ids[:prompt],
        response_ids=ids[prompt:],
        rollout_logprobs=np.zeros(response, np.float32),
        advantage=1.0,
        token_advantages=np.ones(response),
        routes=None if (group, index) == (1, 1) else np.array(rows, dtype=np.uint16),  # one of mixed versions
    )


SAMPLES = [a_sample(group, index) for group in range(GROUPS) for index in range(SIZE)]
ROWS = {int(token) for s in SAMPLES if s.routes is not None for token in s.token_ids[: len(s.routes)]}


def layers_of(parallel: dict[str, int], stage: int) -> tuple[int, ...]:
    """The MoE layers of a stage; layer 0 is dense."""
    if "pipeline" not in parallel:
        return (1, 2, 3, 4)
    if "virtual_pipeline" in parallel:
        return ((1, 3), (2, 4))[stage]
    return ((1,), (2, 3, 4))[stage]


@dataclass
class Dealt:
    tokens: list[list[int]]
    """The ids of this rank's tokens by micro-batch; -1 for padding."""
    routes: list[RouteShard]
    sent: int
    """Bytes that this rank handed to the all-to-all of routes."""
    samples_with_routes: int


def deal(parallel: dict[str, int]) -> Dealt:
    from megatron_gspo.batching.packing import shard_positions
    from megatron_gspo.config import parse
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.train.batch import place
    from megatron_gspo.train.routing import deal_routes

    tree = {
        "model": {"path": "unused"},
        "data": {"path": "unused"},
        "train": {"run_dir": "nowhere", "prompts_per_step": GROUPS, "minibatches": 2, "microbatch_tokens": 24},
        "rollout": {"max_prompt_tokens": 6, "max_response_tokens": 5},
        "parallel": parallel,
    }
    config = parse(tree)
    groups = make_groups(config.parallel)
    mine = [s for s in SAMPLES if s.group % groups.data_size == groups.data_rank] if groups.is_leader else []
    minibatches = place(mine, config, groups)
    sent = 0
    send = dist.all_to_all_single

    def counting(received: torch.Tensor, data: torch.Tensor, *rest: object, **more: object) -> object:
        nonlocal sent
        sent += data.numel()
        return send(received, data, *rest, **more)

    layers = layers_of(parallel, groups.pipeline.rank())
    with mock.patch.object(dist, "all_to_all_single", counting):
        dealt = deal_routes(minibatches, SHAPE, layers, groups)
    tokens = []
    for batch in (batch for m in minibatches for batch in m.batches):
        ids = torch.where(batch.sequence_T < batch.num_sequences, batch.tokens_T, -1)
        if batch.samples == ((-1, -1),):
            ids = torch.full_like(ids, -1)
        tokens.append(ids[shard_positions(batch.cu_seqlens, groups.shard)].tolist())
    kept = sum(s.routes is not None for m in minibatches for part in m.samples for s in part)
    return Dealt(tokens, [shard for part in dealt for shard in part], sent, kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_the_routes_of_its_own_layers_and_tokens(ranks: RankPool, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    results: list[Dealt] = ranks.run(world, deal, parallel)
    replica = world // (2 if "DP2" in layout else 1)
    stages = parallel.get("pipeline", 1)
    seen: dict[tuple[int, int], int] = {}
    for rank, dealt in enumerate(results):
        layers = layers_of(parallel, rank // (world // stages))
        for tokens, shard in zip(dealt.tokens, dealt.routes, strict=True):
            assert shard.layers == layers
            assert shard.present_T.tolist() == [token in ROWS for token in tokens]
            for place, token in enumerate(tokens):
                if token in ROWS:
                    assert (shard.experts_LTK[:, place].long().numpy() == experts_of(token)[list(layers)]).all()
                    for layer in layers:
                        seen[token, layer] = seen.get((token, layer), 0) + 1
    # Every route of an MoE layer reached exactly one rank.
    assert seen == {(token, layer): 1 for token in ROWS for layer in (1, 2, 3, 4)}
    # Two bytes an expert and one a token crossed, for what each rank of the replica holds.
    held = [sum(s.experts_LTK.numel() * 2 + s.present_T.numel() for s in dealt.routes) for dealt in results]
    leaders = [dealt for dealt in results if dealt.samples_with_routes]
    assert sum(dealt.samples_with_routes for dealt in results) == len(SAMPLES) - 1
    assert len(leaders) == world // replica
    if replica > 1:
        assert sum(dealt.sent for dealt in results) == sum(held)
        assert [dealt.sent > 0 for dealt in results].count(True) == len(leaders)


def covered(least: float) -> None:
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.train.routing import check_coverage

    groups = make_groups(ParallelConfig())
    mine = [s for s in SAMPLES if s.group % 2 == dist.get_rank()]
    check_coverage(mine, least, groups)


def test_too_few_routes_stop_the_step_with_the_counts_over_all_leaders(ranks: RankPool) -> None:
    possible = sum(s.length - 1 for s in SAMPLES)
    share = len(ROWS) / possible
    assert 0.7 < share < 0.9
    ranks.run(2, covered, share)
    with pytest.raises(
        RankError, match=rf"routes for {len(ROWS)} of {possible} tokens.*replay.min_coverage = 0.9"
    ) as e:
        ranks.run(2, covered, 0.9)
    assert ReplayError.__name__ in str(e.value)


def compared() -> tuple[dict[str, float], float]:
    """Two passes on TP1 x PP2 x DP2, of four tokens a data rank: what differs depends on rank and layer."""
    from megatron_gspo.batching.packing import pack
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.train.routing import changes_between, coverage

    groups = make_groups(ParallelConfig(pipeline=2))
    ids, rest = np.zeros(2), {"rollout_logprobs": np.zeros(2), "advantage": 1.0, "token_advantages": np.ones(2)}
    samples = [PlacedSample.of_response(ids, ids, group=0, sample=0, **rest, weight=0.5)]
    batch = pack(samples, loss_dtype=torch.float32, pad_to=5)  # one token of padding, whose routes differ
    before = torch.arange(4).view(1, 1, 4).repeat(1, 5, 1).to(torch.uint8)
    after = before.clone()
    after[0, 4] += 10
    if groups.data_rank == 0:
        after[0, 0, :2] += 10  # on both stages: two of the first token's four experts
        if groups.pipeline.rank() == 1:
            after[0, 1, :1] += 10  # and one of the second token's, on the last stage alone
    elif groups.pipeline.rank() == 0:
        after[0, 2] += 10  # all of the third token's on the first stage alone
    present = torch.ones(5, dtype=torch.bool)
    layers = (3 * groups.pipeline.rank() + 1,)
    old, new = (RouteShard(layers, experts, present) for experts in (before, after))
    some = RouteShard(layers, before, torch.arange(5) < (3 if groups.data_rank else 4))
    return changes_between("route/drift", [old], [new], [batch], groups), coverage([some], [batch], groups)


def test_changes_add_up_over_stages_token_by_token_and_over_data_ranks(ranks: RankPool) -> None:
    results = ranks.run(4, compared)
    assert all(result == results[0] for result in results)
    metrics, share = results[0]
    # Of 8 tokens, layer 1 lost 2/4 of one and 4/4 of another; layer 4 lost 2/4 and 1/4. Three tokens have a change.
    assert metrics == {
        "route/drift": pytest.approx((1.5 + 0.75) / 8 / 2),
        "route/drift_tokens": 3 / 8,
        "route/drift/layer_01": 1.5 / 8,
        "route/drift/layer_04": 0.75 / 8,
    }
    assert share == 7 / 8
