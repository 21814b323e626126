"""The heads that ``bench logprobs`` compares compute the same, and the memory that it reports is what was taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.steps import worst
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


def outputs_and_gradients(ranks: int) -> dict[str, dict[str, np.ndarray]]:
    """By head: this rank's logprobs and gradients, in float64."""
    from megatron_gspo.bench.heads import HEADS, Problem
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups

    group = make_groups(ParallelConfig(tensor=ranks)).tensor
    found = {}
    for head in ["ours", "megatron", *(["full-logits"] if ranks == 1 else [])]:
        problem = Problem.make(tokens=12, vocab=40, hidden=6, chunk=8, dtype=torch.float64, group=group)
        logprobs, backward = HEADS[head](problem)
        backward()
        own = logprobs if len(logprobs) < 12 or ranks == 1 else logprobs.chunk(ranks)[group.rank()]
        found[head] = {
            "logprobs": own.detach().numpy(),
            "d hidden": problem.hidden_TH.grad.numpy(),  # type: ignore[union-attr]
            "d weight": problem.main_grad_VH.numpy(),
        }
    return found


def test_on_one_rank_every_head_gives_the_same_logprobs_and_gradients(ranks: RankPool) -> None:
    (found,) = ranks.run(1, outputs_and_gradients, 1)
    assert worst(found["ours"], found["full-logits"])[0] < 1e-13
    # Megatron's cross entropy is float32 whatever it is given.
    assert worst(found["megatron"], found["full-logits"])[0] < 1e-6


def test_on_two_ranks_ours_gives_what_megatrons_cross_entropy_gives(ranks: RankPool) -> None:
    for found in ranks.run(2, outputs_and_gradients, 2):
        assert worst(found["ours"], found["megatron"])[0] < 1e-6


def samples(heads: list[str], **sizes: Any) -> dict[str, Any]:
    from megatron_gspo.bench.heads import Problem
    from megatron_gspo.bench.logprobs import measure
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups

    group = make_groups(ParallelConfig(tensor=1)).tensor
    device = torch.device("cpu")
    for head in heads:  # what libraries keep after their first call is not a head's
        measure(head, Problem.make(tokens=8, vocab=64, hidden=8, chunk=8, dtype=torch.float32, group=group), device)
    problem = Problem.make(dtype=torch.float32, group=group, **sizes)
    return {head: measure(head, problem, device) for head in heads}


def at_a_thousand_tokens() -> dict[str, Any]:
    return samples(["ours", "full-logits", "matmuls"], tokens=1024, vocab=40_000, hidden=64, chunk=128)


def test_ours_takes_less_than_a_tenth_of_the_memory_of_full_logits(ranks: RankPool) -> None:
    found = ranks.run(1, at_a_thousand_tokens)[0]
    extra = {head: sample[3] for head, sample in found.items()}
    logits = 4 * 1024 * 40_000
    # Full logits: in backward there are log-softmax, its gradient, and the logits' gradient.
    assert 2.9 * logits < extra["full-logits"] < 3.3 * logits
    assert 1.0 * logits < extra["matmuls"] < 1.2 * logits
    tile = 4 * 128 * 8192
    assert tile < extra["ours"] < 2 * tile + 8e6
    assert extra["ours"] < 0.1 * extra["full-logits"]
