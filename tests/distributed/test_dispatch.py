"""Tokens reach the experts that they chose and come back as a sum, over any number of expert and shard ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.pool import RankPool

pytestmark = pytest.mark.distributed

TOKENS, EXPERTS, TOP_K, WIDTH = 7, 6, 3, 4


def choices(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One rank's hidden states, experts and probabilities; nobody chooses expert 1."""
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    scores[:, 1] = -1
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, scores.topk(TOP_K).indices, True)
    probs = torch.where(chosen, torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64), 0)
    return torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64), chosen, probs


def factor(expert: torch.Tensor) -> torch.Tensor:
    """What an expert multiplies a row by."""
    return 2.0 + expert


def through_experts(shards: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, gradient of hidden states, gradient of probabilities) of this rank. A shard gives its part: 1 of s."""
    import torch.distributed as dist

    from megatron_gspo.parallel.dispatch import from_experts, plan_dispatch, probs_to_experts, to_experts

    rank, world = dist.get_rank(), dist.get_world_size()
    x, chosen, probs = choices(rank)
    x.requires_grad_(), probs.requires_grad_()
    group = dist.group.WORLD
    plan = plan_dispatch(chosen, TOP_K, group, shards)
    rows, weights = to_experts(x, plan), probs_to_experts(probs, plan)
    local = EXPERTS * shards // world
    expert = (rank // shards * local + torch.arange(local)).repeat_interleave(plan.counts_e)
    part = (rank % shards + 1) / (shards * (shards + 1) / 2)  # parts of different size, 1 together
    out = from_experts(rows * (weights * factor(expert) * part)[:, None], plan)
    (out * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)).sum().backward()
    return out.detach(), x.grad, probs.grad


@pytest.mark.parametrize(("world", "shards"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (3, 3)])
def test_a_token_gets_the_weighted_sum_of_its_experts(ranks: RankPool, world: int, shards: int) -> None:
    for rank, (out, grad_x, grad_probs) in enumerate(ranks.run(world, through_experts, shards)):
        x, _, probs = choices(rank)
        x.requires_grad_(), probs.requires_grad_()
        expected = x * (probs * factor(torch.arange(EXPERTS))).sum(dim=1, keepdim=True)
        (expected * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)).sum().backward()
        torch.testing.assert_close(out, expected.detach(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(grad_x, x.grad, rtol=1e-13, atol=1e-14)
        chosen = choices(rank)[1]
        torch.testing.assert_close(grad_probs[chosen], probs.grad[chosen], rtol=1e-13, atol=1e-14)


def without_the_other_shards(shards: int) -> object:
    """A token's rows from its first shard alone."""
    from megatron_gspo.parallel import dispatch

    plan = dispatch.ordered_sum
    with mock.patch.object(dispatch, "ordered_sum", lambda rows, of: plan(rows, of[:, :: max(1, shards)])):
        return through_experts(shards)


def test_a_sum_that_leaves_shards_out_shows(ranks: RankPool) -> None:
    out, _, _ = ranks.run(2, without_the_other_shards, 2)[0]
    x, _, probs = choices(0)
    assert (out - x * (probs * factor(torch.arange(EXPERTS))).sum(dim=1, keepdim=True)).abs().max() > 0.1
