"""Routes laid out, cut and compared, against the same by definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_gspo.algorithm.routing import counted_tokens, cut, cut_size, lay_out, pasted, route_changes
from megatron_gspo.batching.packing import dummy_batch, pack, shard_positions
from megatron_gspo.errors import BatchError
from megatron_gspo.types import PlacedSample, RouteShape, RouteShard, Shard

SHAPE = RouteShape(moe_layers=(False, True, True, True), top_k=2, num_experts=8)
WIDE = replace(SHAPE, num_experts=300)


def sample(group: int, prompt: int, response: int, rows: int | None = -1, shape: RouteShape = SHAPE) -> PlacedSample:
    """``rows`` of routes; -1: all that there can be."""
    length = prompt + response
    rows = length - 1 if rows == -1 else rows
    draw = np.random.default_rng([group, length])
    routes = None
    if rows is not None:
        scores = draw.random((rows, len(shape.moe_layers), shape.num_experts))
        routes = scores.argsort(axis=-1)[..., : shape.top_k].astype(shape.dtype)
    return PlacedSample.of_response(
        group=group,
        sample=0,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        response_ids=np.arange(response, dtype=np.int32),
        rollout_logprobs=np.zeros(response, dtype=np.float32),
        advantage=1.0,
        token_advantages=np.ones(response),
        weight=0.5,
        routes=routes,
    )


def shard_of(experts_LTK: list[list[list[int]]], present: list[bool] | None = None) -> RouteShard:
    experts = torch.tensor(experts_LTK, dtype=torch.uint8)
    tokens = experts.shape[1]
    return RouteShard(
        tuple(range(2, 2 + len(experts))), experts, torch.tensor([True] * tokens if present is None else present)
    )


def test_each_token_of_a_micro_batch_has_its_own_row_and_the_last_of_a_response_has_none() -> None:
    samples = [sample(0, 3, 2), sample(1, 2, 4, rows=3), sample(2, 1, 2, rows=None)]
    batch = pack(samples, loss_dtype=torch.float32, context=2, tensor=2)
    experts_TLK, present_T = lay_out(samples, batch, SHAPE)
    assert batch.cu_seqlens[:4].tolist() == [0, 8, 16, 20]
    assert np.flatnonzero(present_T).tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert samples[0].routes is not None and samples[1].routes is not None
    assert (experts_TLK[:4] == samples[0].routes).all() and (experts_TLK[8:11] == samples[1].routes).all()


def test_a_dummy_has_no_routes() -> None:
    experts_TLK, present_T = lay_out([], dummy_batch(torch.float32, tensor=2), SHAPE)
    assert experts_TLK.shape == (2, 4, 2) and not present_T.any()


def test_more_rows_than_inputs_are_refused() -> None:
    samples = [sample(0, 3, 2, rows=5)]
    with pytest.raises(BatchError, match="5 rows of routes for 5 tokens"):
        lay_out(samples, pack(samples, loss_dtype=torch.float32), SHAPE)


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["one byte", "two bytes"])
def test_what_is_cut_and_pasted_is_the_slice_of_the_whole(shape: RouteShape) -> None:
    samples = [sample(0, 3, 3, shape=shape), sample(1, 2, 5, rows=4, shape=shape)]
    batch = pack(samples, loss_dtype=torch.float32, context=2, tensor=2)
    experts_TLK, present_T = lay_out(samples, batch, shape)
    for layers in ((1, 2, 3), (2,), ()):
        for context in range(2):
            own = shard_positions(batch.cu_seqlens, Shard(1, 2, context, 2)).numpy()
            data = cut(experts_TLK, present_T, layers, own)
            assert data.dtype == np.uint8 and len(data) == cut_size(len(own), len(layers), shape)
            part = pasted(torch.from_numpy(data), layers, len(own), shape)
            assert part.layers == layers and part.present_T.tolist() == present_T[own].tolist()
            expected = [[experts_TLK[token, layer].tolist() for token in own] for layer in layers]
            assert part.experts_LTK.tolist() == expected
    assert experts_TLK.max() > (255 if shape is WIDE else 6)


def test_routes_of_a_layer_differ_by_the_share_of_experts_that_are_not_in_both() -> None:
    a = shard_of([[[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]])
    b = shard_of([[[1, 0], [2, 4], [6, 7], [0, 1]], [[0, 1], [3, 2], [4, 6], [0, 1]]])
    changes = route_changes([a], [b], [torch.tensor([True, True, True, False])])
    # Layer 2: the same two in another order, one of two, none. Layer 3: same, same, one of two.
    assert changes.experts_L.tolist() == [0.0 + 0.5 + 1.0, 0.0 + 0.0 + 0.5]
    assert changes.changed_T.tolist() == [False, True, True, False]
    assert changes.counted_T.tolist() == [True, True, True, False]


def test_tokens_without_a_route_on_either_side_do_not_count() -> None:
    a = shard_of([[[0, 1], [2, 3], [4, 5]]], [True, False, True])
    b = shard_of([[[2, 3], [4, 5], [0, 1]]], [True, True, False])
    changes = route_changes([a, a], [b, a], [torch.ones(3, dtype=torch.bool)] * 2)
    assert changes.experts_L.tolist() == [1.0]
    assert changes.counted_T.tolist() == [True, False, False, True, False, True]
    assert changes.changed_T.tolist() == [True, False, False, False, False, False]


def test_numbers_above_255_are_told_apart() -> None:
    a, b = (
        RouteShard((0,), torch.tensor([[[experts]]]).to(torch.uint16), torch.tensor([True])) for experts in (1, 257)
    )
    assert route_changes([a], [b], [torch.tensor([True])]).experts_L.tolist() == [1.0]


def test_routes_of_other_routers_are_not_compared() -> None:
    a = shard_of([[[0, 1]]])
    with pytest.raises(BatchError, match=r"layers \(2,\).*layers \(5,\)"):
        route_changes([a], [replace(a, layers=(5,))], [torch.tensor([True])])


def test_the_tokens_that_count_are_those_of_prompts_and_responses() -> None:
    samples = [sample(0, 3, 2), sample(1, 2, 4)]
    batch = pack(samples, loss_dtype=torch.float32, context=2, tensor=2, pad_to=3)
    counted = sum(int(counted_tokens(batch, Shard(t, 2, c, 2)).sum()) for t in range(2) for c in range(2))
    assert counted == 5 + 6 < batch.num_tokens
    assert not counted_tokens(dummy_batch(torch.float32), Shard()).any()
