"""Attention over context ranks is that of each sequence alone, whichever kernel computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_gspo.types import Sample
from tests import oracle
from tests.attention import Arrays, attention_of_ranks, naive_attention, padded
from tests.distributed.steps import worst
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


def sdpa(context: int) -> Arrays:
    from megatron_gspo.megatron.attention import Sdpa

    return attention_of_ranks(Sdpa, torch.float64, context)


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    enable_gqa: bool = False,
    **options: Any,
) -> torch.Tensor:
    """What torch documents of ``varlen_attn``, a query at a time; flash attention aligns the mask to the last key."""
    assert options == {"scale": None, "window_size": (-1, 0)}
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    rows = []
    for run in range(len(cu_seq_q) - 1):
        queries, keys = query[cu_seq_q[run] : cu_seq_q[run + 1]], slice(cu_seq_k[run], cu_seq_k[run + 1])
        k, v = (x[keys].repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        for index, q in enumerate(queries):
            seen = len(k) - len(queries) + index + 1
            scores = torch.einsum("khd,hd->hk", k[:seen], q) / q.shape[-1] ** 0.5
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[:seen]))
    return torch.stack(rows)


def varlen(context: int) -> Arrays:
    from torch.nn.attention import varlen as module

    from megatron_gspo.megatron.attention import Varlen

    with mock.patch.object(module, "varlen_attn", varlen_by_definition):
        return attention_of_ranks(Varlen, torch.float64, context)


def varlen_of_torch_2_11(context: int) -> Arrays:
    """Which knows no groups of heads: keys and values are repeated."""
    from torch.nn.attention import varlen as module

    from megatron_gspo.megatron.attention import Varlen

    def without_groups(*args: Any, scale: float | None, window_size: tuple[int, int]) -> torch.Tensor:
        return varlen_by_definition(*args, scale=scale, window_size=window_size)

    with mock.patch.object(module, "varlen_attn", without_groups):
        return attention_of_ranks(Varlen, torch.float64, context)


@pytest.mark.parametrize("context", [1, 2, 3, 4])
def test_the_ranks_attention_put_together_is_that_of_each_sequence_alone(ranks: RankPool, context: int) -> None:
    (actual,) = ranks.run(1, sdpa, context)
    error, where = worst(actual, naive_attention(torch.float64, padded(context)))
    assert error < 1e-13, f"{where} is off by {error:.1e}"


@pytest.mark.parametrize("kernel", [varlen, varlen_of_torch_2_11])
@pytest.mark.parametrize("context", [1, 3])
def test_the_variable_length_kernel_is_told_which_keys_each_run_of_queries_sees(
    ranks: RankPool, kernel: Callable[[int], Arrays], context: int
) -> None:
    """The flash kernel runs on a GPU only (tests/gpu); its definition stands in for it here, its arguments are ours."""
    (actual,) = ranks.run(1, kernel, context)
    error, where = worst(actual, naive_attention(torch.float64, padded(context)))
    assert error < 1e-13, f"{where} is off by {error:.1e}"


def placed_tokens(parallel: dict[str, int], budget: int) -> list[list[int]]:
    """The tokens of each micro-batch, with padding, of twelve responses of five tokens that the first leader drew."""
    from megatron_gspo.config import parse
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.train.batch import place

    tree = {
        "model": {"path": "unused"},
        "data": {"path": "unused"},
        "train": {"run_dir": "nowhere", "prompts_per_step": 3, "minibatches": 1, "microbatch_tokens": budget},
        "rollout": {"max_prompt_tokens": 2, "max_response_tokens": 3},
        "parallel": parallel,
    }
    config = parse(tree)
    groups = make_groups(config.parallel)
    samples = [five_tokens(group, index) for group in range(3) for index in range(4)] if groups.is_leader else []
    (minibatch,) = place(samples if groups.data_rank == 0 else [], config, groups)
    assert all(batch.num_tokens % groups.shard.size == 0 for batch in minibatch.batches)
    return [batch.tokens_T.tolist() for batch in minibatch.batches]


def five_tokens(group: int, index: int) -> Sample:
    prompt, response = np.full(2, group + 1), np.full(3, index + 1)
    rest = {"rollout_logprobs": np.zeros(3, np.float32), "advantage": 0.0, "token_advantages": np.zeros(3)}
    return Sample.of_response(prompt, response, group=group, sample=index, **rest)


def test_the_token_budget_counts_what_context_parallelism_fills_up_and_its_ranks_get_the_same(ranks: RankPool) -> None:
    # Without context ranks three sequences of 5 fit into 16 tokens; filled up to 8, two do.
    assert [len(batch) for batch in ranks.run(1, placed_tokens, {}, 16)[0]] == [15] * 4
    first, second = ranks.run(2, placed_tokens, {"context": 2}, 16)
    assert [len(batch) for batch in first] == [16] * 6
    assert first == second


def fine_tuned(path: str, parallel: dict[str, int]) -> dict[str, float]:
    """The metrics of one supervised step."""
    from megatron_gspo.config import parse
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.megatron.policy import Policy
    from megatron_gspo.train.batch import place
    from megatron_gspo.train.sft import supervised_step

    tree = {
        "model": {"path": path, "dtype": "float64"},
        "data": {"path": "unused"},
        "algorithm": {"name": "sft"},
        "train": {"run_dir": "nowhere", "prompts_per_step": 12},
        "parallel": parallel,
    }
    config = parse(tree)
    groups = make_groups(config.parallel)
    samples = oracle.random_samples(groups=12, group_size=1) if groups.is_leader else []
    (minibatch,) = place(samples, config, groups)
    return supervised_step(config, groups, Policy(config, groups), minibatch, 0)


def test_a_supervised_step_is_that_of_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    path = str(oracle.make_tiny_qwen3_moe(tmp_path, layers=2))
    (alone,) = ranks.run(1, fine_tuned, path, {})
    for metrics in ranks.run(4, fine_tuned, path, {"tensor": 2, "context": 2}):
        assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-7)  # Megatron's float32 router
        assert metrics["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6)


def groups_of_a_rank(parallel: dict[str, int]) -> dict[str, list[int]]:
    import torch.distributed as dist

    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.megatron.groups import make_groups

    groups = make_groups(ParallelConfig(**parallel))
    names = ("tensor", "context", "token", "data", "data_context", "replica", "tensor_data", "pipeline")
    members = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}
    return members | {"leader": [groups.leader_rank], "last": [groups.last_stage_leader_rank]}


def test_every_rank_is_in_the_groups_of_its_coordinates(ranks: RankPool) -> None:
    """Ranks are numbered tensor first, then context, data, pipeline."""
    for tensor, context, data, pipeline in ((2, 2, 1, 2), (1, 2, 2, 2), (2, 2, 2, 1)):
        parallel = {"tensor": tensor, "context": context, "pipeline": pipeline}
        places = [
            (t, c, d, p) for p in range(pipeline) for d in range(data) for c in range(context) for t in range(tensor)
        ]

        def alike(place: tuple[int, ...], *axes: int, places: Any = places) -> list[int]:
            """Ranks that agree with it on these axes."""
            return [rank for rank, other in enumerate(places) if all(other[a] == place[a] for a in axes)]

        for place, groups in zip(places, ranks.run(len(places), groups_of_a_rank, parallel), strict=True):
            assert groups == {
                "tensor": alike(place, 1, 2, 3),
                "context": alike(place, 0, 2, 3),
                "token": alike(place, 2, 3),
                "data": alike(place, 0, 1, 3),
                "data_context": alike(place, 0, 3),
                "replica": alike(place, 2),
                "tensor_data": alike(place, 3),
                "pipeline": alike(place, 0, 1, 2),
                "leader": alike(place, 2)[:1],
                "last": [rank for rank in alike(place, 2) if places[rank][3] == pipeline - 1][:1],
            }, place
