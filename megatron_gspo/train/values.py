"""The critic's part of a mini-batch: its gradients, its optimizer step, and what they say of themselves."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.gae import value_loss
from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.exchange import broadcast_object
from megatron_gspo.parallel.sums import reduce_token_sums
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.learner import Learner


def train_critic(run: Learner, minibatch: Minibatch, step: int) -> dict[str, float]:
    """``critic.epochs`` optimizer steps of the critic on a mini-batch whose shards hold values and returns; the metrics
    of the first one, empty without a critic. Collective."""
    if run.critic is None:
        return {}
    found: dict[str, float] = {}
    for _ in range(run.config.critic.epochs):
        metrics = critic_gradients(run, minibatch)
        norm, lr = run.critic.step(step, run.config.total_steps)
        found = found or metrics | {"critic/grad_norm": norm, "critic/lr": lr}
    return found


def critic_gradients(run: Learner, minibatch: Minibatch) -> dict[str, float]:
    """``train_critic`` up to the optimizer: ``critic/loss`` and ``critic/clip_frac``, on every rank. Collective."""
    assert run.critic is not None
    clip = run.config.critic.clip_value or None
    tokens = torch.zeros(2, dtype=torch.float64, device=device())
    loss = torch.zeros(1, dtype=torch.float64, device=device())

    def loss_of(index: int, values_T: torch.Tensor) -> torch.Tensor:
        nonlocal tokens, loss
        shard = minibatch.shards[index]
        output = value_loss(shard, values_T, clip, run.sequence_sum)
        counted_T = shard.mask_T & expand(shard.weights_S > 0, shard.sequence_T)
        tokens = tokens + torch.stack([counted_T.sum(), (output.clipped_T & counted_T).sum()]).double()
        loss = loss + output.loss.detach().double()
        return output.loss

    run.critic.gradients(minibatch.batches, loss_of)
    metrics = None
    if run.groups.is_last_stage:
        count, clipped = reduce_token_sums(tokens, stage=run.groups.tensor_data).tolist()
        total = float(reduce_token_sums(loss, stage=run.groups.data))
        metrics = {"critic/loss": total, "critic/clip_frac": clipped / max(count, 1.0)}
    return broadcast_object(metrics, run.groups.last_stage_rank, run.groups.pipeline)
