"""The critic: values, GAE, and the gradients of the value loss, of a layout and once more by naive formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.config import CriticConfig, RunConfig
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron.critic import Critic
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import Case
from megatron_gspo.parity.naive import naive_weights
from megatron_gspo.parity.parts import CriticPart
from megatron_gspo.parity.tensors import gradient_copies
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.credit import give_credit
from megatron_gspo.train.learner import Learner
from megatron_gspo.train.passes import value_pass
from megatron_gspo.train.values import critic_gradients
from megatron_gspo.types import TokenShard

GRADIENTS = "critic-gradients.safetensors"
KL_REWARD = 0.05
SETTINGS = CriticConfig(gamma=0.99, lam=0.9, value_lam=0.97, clip_value=0.3)
MOVED = 0.2
"""Values before the update are the critic's, moved by a multiple of this: some of them beyond ``clip_value``."""


@dataclass(frozen=True)
class CriticReference:
    """The same of one process; arrays are [tokens] float64, NaN where a token predicts no trained token."""

    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    metrics: dict[str, float]
    names: set[str]
    gradient_scale: float
    """Largest entry of any gradient."""


def with_critic(config: RunConfig) -> RunConfig:
    """The configuration of a critic's step."""
    algorithm = make_algorithm("ppo", credit="gae", kl_reward_coef=KL_REWARD)
    return config.model_copy(update={"algorithm": algorithm, "critic": SETTINGS})


@torch.no_grad()
def disturb_head(critic: Critic) -> None:
    """Values that differ by token: a head of zeros would give all of them, and all gradients below it, as 0."""
    for chunk in critic.chunks:
        for own, named in chunk.rules(critic.family):
            parameter = own.data
            if named.hf_names == ("score.weight",):
                parameter.copy_(head_weight(parameter.shape[1]).to(parameter))
            elif named.hf_names == ("score.bias",):
                parameter.fill_(0.1)


def head_weight(hidden: int) -> torch.Tensor:
    """[1, H] float64."""
    return torch.cos(torch.arange(hidden, dtype=torch.float64))[None] / math.sqrt(hidden)


# ------------------------------------------------------------------------------------------------------------ a layout


def critic_step(case: Case, learner: Learner, minibatches: Sequence[Minibatch], references: Path) -> CriticPart:
    """A layout's critic, up to the gradients of the first mini-batch. Collective."""
    config = with_critic(learner.config)
    critic = Critic(config, learner.groups)
    disturb_head(critic)
    learner = replace(learner, config=config, critic=critic)
    minibatches = [each.with_shards(shards.weighed_as(case, each, i, config)) for i, each in enumerate(minibatches)]
    made = iter(value_pass(learner, [batch for minibatch in minibatches for batch in minibatch.batches]))
    valued = [each.with_shards([shard | next(made) for shard in each.shards]) for each in minibatches]
    try:
        credited = give_credit(learner, valued)
    except NonFiniteError as error:  # raised on every rank; the step before it says whether it is the critic's alone
        return CriticPart(not_finite=str(error))
    part = CriticPart(metrics=credited.metrics)
    for minibatch in credited.minibatches:
        for batch, shard in zip(minibatch.batches, minibatch.shards, strict=bool(minibatch.shards)):
            own = shard.mask_T.cpu().numpy()
            part.numbers.append(shards.own_numbers(case, batch, learner.groups)[own])
            for values, column in (
                (part.values, shard.values_T),
                (part.advantages, shard.advantages_T),
                (part.returns, shard.returns_T),
            ):
                values.append(column.double().cpu().numpy()[own])
    first = credited.minibatches[0]
    part.metrics |= critic_gradients(learner, first.with_shards([_moved(case, shard) for shard in first.shards]))
    part.gradients = gradient_copies(critic, references / GRADIENTS)
    return part


def _moved(case: Case, shard: TokenShard) -> TokenShard:
    """The shard of an update that is not the first: V_old is not V."""
    signs_S = shard.values_T.new_tensor([moved_by(case, key) for key in shard.samples] + [0.0])
    return shard.replace(values_T=shard.values_T + signs_S[shard.sequence_T])


def moved_by(case: Case, key: tuple[int, int]) -> float:
    """By how much V_old of a response is moved: within the clip range and beyond it, up and down."""
    return MOVED * (-2.0, -1.0, 1.0, 2.0)[sum(key) % 4]


# --------------------------------------------------------------------------------------------------------- one process


def critic_reference(case: Case, learner: Learner, directory: Path) -> CriticReference:
    """One process, one sequence a micro-batch, GAE and value loss token by token. Writes the gradients' file."""
    critic = Critic(with_critic(learner.config), learner.groups)
    disturb_head(critic)
    values = {index: _values(case, critic, index) for index in range(len(case.samples))}
    reference, loss = naive_critic(case, values)

    def objective(position: int, values_T: torch.Tensor) -> torch.Tensor:
        index = case.minibatches[0][position]
        return loss(index, values_T[torch.from_numpy(case.samples[index].predicting)])

    critic.gradients([shards.pack_alone(case, index) for index in case.minibatches[0]], objective)
    gradients = dict(critic.named_gradients())
    save_file(gradients, directory / GRADIENTS)
    return replace(
        reference,
        names=set(gradients),
        gradient_scale=max(float(gradient.abs().max()) for gradient in gradients.values()),
    )


def _values(case: Case, critic: Critic, index: int) -> np.ndarray:
    (values_T,) = critic.values([shards.pack_alone(case, index)])
    return values_T[torch.from_numpy(case.samples[index].predicting)].double().cpu().numpy()


class NaiveLoss:
    """The value loss of a response, and what is said of all of them."""

    def __init__(self, case: Case, values: Mapping[int, np.ndarray], returns: Mapping[int, np.ndarray]) -> None:
        members = case.minibatches[0]
        self.case, self.values, self.returns = case, values, returns
        self.weights = dict(zip(members, naive_weights([case.samples[i].group for i in members]), strict=True))

    def __call__(self, index: int, values_R: torch.Tensor) -> torch.Tensor:
        """weight / |y| sum_t max((V - R)^2, (V_old + clip(V - V_old) - R)^2) / 2."""
        total, clip = values_R.new_zeros(()), SETTINGS.clip_value
        for value, old, target in zip(values_R, self.values[index], self.returns[index], strict=True):
            old = old + moved_by(self.case, self.case.keys[index])
            bounded = old + min(max(float(value) - old, -clip), clip)
            plain = (value - target) ** 2
            beyond = abs(float(value) - old) > clip and (bounded - target) ** 2 > float(plain)
            total = total + (plain * 0 + (bounded - target) ** 2 if beyond else plain)
        return self.weights[index] / len(values_R) * total / 2

    def metrics(self) -> dict[str, float]:
        """``critic/loss`` and ``critic/clip_frac`` of the first mini-batch."""
        loss, clipped, count = 0.0, 0, 0
        for index in self.case.minibatches[0]:
            loss += float(self(index, torch.from_numpy(self.values[index])))
            move = moved_by(self.case, self.case.keys[index])
            for value, target in zip(self.values[index], self.returns[index], strict=True):
                bounded = value + move + min(max(-move, -SETTINGS.clip_value), SETTINGS.clip_value)
                clipped += abs(move) > SETTINGS.clip_value and (bounded - target) ** 2 > (value - target) ** 2
                count += 1
        return {"critic/loss": loss, "critic/clip_frac": clipped / count}


def naive_critic(case: Case, values: Mapping[int, np.ndarray]) -> tuple[CriticReference, NaiveLoss]:
    """GAE of every sample by its recursion (arXiv 1506.02438, eq. 11 and 16), whitened; and the loss of values."""
    advantages, returns = {}, {}
    for index, own in values.items():
        kl_R = case.old[index] - case.ref[index]
        rewards_R = case.samples[index].rewards - KL_REWARD * kl_R
        advantages[index] = _gae(rewards_R, own, SETTINGS.lam)
        returns[index] = _gae(rewards_R, own, SETTINGS.value_lam or SETTINGS.lam) + own
    every = np.concatenate([advantages[index] for index in sorted(advantages)])
    white = {index: (own - every.mean()) / every.std() for index, own in advantages.items()}
    targets = np.concatenate([returns[index] for index in sorted(returns)])
    all_values = np.concatenate([values[index] for index in sorted(values)])
    loss = NaiveLoss(case, values, returns)
    metrics = {
        "critic/returns": float(targets.mean()),
        "critic/returns_squared": float((targets**2).mean()),
        "critic/values": float(all_values.mean()),
        "critic/explained_variance": float(1 - np.var(targets - all_values) / np.var(targets)),
        **loss.metrics(),
    }
    reference = CriticReference(
        values=shards.scattered(case, values, np.nan),
        advantages=shards.scattered(case, white, np.nan),
        returns=shards.scattered(case, returns, np.nan),
        metrics=metrics,
        names=set(),
        gradient_scale=0.0,
    )
    return reference, loss


def _gae(rewards_R: np.ndarray, values_R: np.ndarray, lam: float) -> np.ndarray:
    advantages, later, next_value = np.zeros(len(values_R)), 0.0, 0.0
    for t in reversed(range(len(values_R))):
        delta = rewards_R[t] + SETTINGS.gamma * next_value - values_R[t]
        later = delta + SETTINGS.gamma * lam * later
        advantages[t], next_value = later, values_R[t]
    return advantages
