"""Completing metric sums over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gspo.algorithm.metrics import MetricSums
from megatron_gspo.algorithm.routing import RouteChanges
from megatron_gspo.parallel.exchange import gather_objects


def reduce_metric_sums(sums: MetricSums, *, stage: dist.ProcessGroup, data: dist.ProcessGroup) -> MetricSums:
    """The sums of the whole mini-batch, on every rank of a pipeline stage.

    Args:
        sums: this rank's.
        stage: tensor x context x data ranks of the stage: tokens are cut over all of them.
        data: data-parallel ranks: sequences are spread over these, and whole on each tensor and context rank.
    """
    token, sequence = reduce_token_sums(sums.token, stage=stage), sums.sequence.clone()
    dist.all_reduce(sequence, group=data)
    return MetricSums(token, sequence, _concatenate(sums.log_ratio_S, data))


def reduce_token_sums(sums: torch.Tensor, *, stage: dist.ProcessGroup) -> torch.Tensor:
    """[n] sums over this rank's tokens, over all of the stage's: tensor, context and data ranks each hold a slice."""
    total = sums.clone()
    dist.all_reduce(total, group=stage)
    return total


@dataclass(frozen=True)
class StageTotals:
    """``algorithm.base.Totals`` over the ranks of a pipeline stage, each of which holds a slice of the tokens."""

    stage: dist.ProcessGroup
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """[n] float64 sums over the stage."""
        return reduce_token_sums(values.to(self.device), stage=self.stage)

    def nth_largest(self, values: torch.Tensor, n: int) -> float:
        """Each rank's n largest are enough."""
        own = values.topk(min(n, values.numel())).values
        every = torch.tensor(
            [value for part in gather_objects(own.tolist(), self.stage) for value in part], dtype=torch.float64
        )
        return float(every.topk(n).values[-1]) if n <= every.numel() else -math.inf


def heaviest_expert(counts: torch.Tensor, *, stage: dist.ProcessGroup, pipeline: dist.ProcessGroup) -> float:
    """Tokens of the most loaded expert over those of a mean one, in the worst layer of all stages; on every rank.

    ``counts``: [layers of this stage, experts] of this rank's tokens; stages without an MoE layer have none.
    """
    worst = torch.zeros(1, dtype=torch.float64, device=counts.device)
    if counts.numel():
        total = counts.clone()
        dist.all_reduce(total, group=stage)
        loads = total.amax(dim=1) / total.mean(dim=1)
        worst = loads.nan_to_num(nan=0.0).max().reshape(1)  # a layer that saw no token has no load
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=pipeline)
    return float(worst)


def reduce_route_changes(
    changes: RouteChanges, *, stage: dist.ProcessGroup, pipeline: dist.ProcessGroup
) -> tuple[dict[int, float], float]:
    """({layer: share of experts that changed}, share of tokens with a changed layer) over all ranks; on every rank.

    A token's layers lie on the stages of its pipeline, each of which knows of its own alone: whether any has changed is
    agreed token by token, and counted after that. Empty and 0 when no token counts.
    """
    changed_T = changes.changed_T.int()
    dist.all_reduce(changed_T, op=dist.ReduceOp.MAX, group=pipeline)
    totals = torch.stack([changed_T.sum(), changes.counted_T.sum()]).double()
    sums = torch.cat([changes.experts_L, totals])
    dist.all_reduce(sums, group=stage)
    *experts_L, changed, counted = sums.tolist()
    if not counted:
        return {}, 0.0
    own = {layer: experts / counted for layer, experts in zip(changes.layers, experts_L, strict=True)}
    shares = {layer: share for part in gather_objects(own, pipeline) for layer, share in part.items()}
    return dict(sorted(shares.items())), changed / counted


def _concatenate(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Tensors of different lengths, end to end in rank order: padded to the longest, gathered, cut."""
    length = torch.tensor([values.numel()], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(group.size())]
    dist.all_gather(lengths, length, group=group)
    counts = [int(count) for count in lengths]
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([row[:count] for row, count in zip(gathered, counts, strict=True)])
