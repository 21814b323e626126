"""What is measured of a mini-batch, as sums that add up over micro-batches and ranks, and as the final numbers.

Only responses with weight > 0 count (dummy micro-batches have none). Over the n response tokens t and m responses i:

    loss                          sum_i loss_i, the globally normalised objective (KL term included)
    ratio/mean                    mean_i s_i = 1 + mean_i expm1(log s_i)
    ratio/p01, p05, ... p99       quantiles over i of s_i (linear interpolation)
    ratio/abs_log_mean            mean_i |log s_i|
    ratio/token_log_rms           sqrt(mean_t (log w_t)^2)
    ratio/ess                     (sum_i s_i)^2 / (m sum_i s_i^2): effective sample size as a share of m
    clip/frac_tokens              tokens on the clipped branch / n
    clip/frac_low, frac_high      the same, below 1 - clip_low (A < 0) and above 1 + clip_high (A > 0)
    clip/frac_sequences           responses with a token on the clipped branch / m
    clip/frac_tokens_nonzero_adv  clipped tokens / tokens with A_t != 0 (groups without variance cannot clip); 0 if none
    entropy                       mean_t of the full-vocabulary entropy of pi_theta, in nats
    kl/engine_k1                  mean_t (log mu_t - log pi_old_t)
    kl/engine_k3                  mean_t (rho_t - 1 - log rho_t), rho_t = pi_old_t / mu_t
    kl/engine_tail                share of tokens with max(rho_t, 1 / rho_t) > 2
    kl/ref_k1                     mean_t (log pi_theta_t - log pi_ref_t); with a reference alone, as is the next
    kl/ref_k3                     mean_t (r_t - 1 - log r_t), r_t = pi_ref_t / pi_theta_t
    noise/abs_log_ratio_p50, p99  quantiles of |log s_i| between two packings at equal weights

and of an outer step's groups p (``rollout_metrics``):

    reward/mean, reward/std       over all surviving responses (population std)
    reward/zero_std_groups        share of surviving groups whose rewards are all equal
    length/mean                   mean response tokens
    length/mean_positive          the same over responses with A_i > 0; absent if there are none
    length/mean_negative          the same over responses with A_i < 0; absent if there are none
    length/truncated              share of surviving responses that the length limit cut
    dropped/responses             responses dropped before training (a count)

``kl/ref_*`` estimate KL(pi_theta || pi_ref) from tokens that mu drew, without a weight: without bias where pi_theta is
mu, as in the first mini-batch but for the engine gap, and as far off afterwards as pi_theta has moved. (The KL term of
the loss weighs the same k3 by pi_theta / pi_old, and responses as the loss does.)

No value of a log-ratio ends a run here: what overflows becomes an infinity, or a NaN, and is not reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.algorithm.advantages import is_zero_variance
from megatron_gspo.algorithm.kl import k3
from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.types import LossOutput, TokenShard

TOKEN_SUMS = ("clipped_low", "clipped_high", "nonzero_advantage", "log_ratio_squared", "entropy")
ENGINE_SUMS = ("tokens", "k1", "k3", "tail")
REFERENCE_SUMS = ("ref_tokens", "ref_k1", "ref_k3")
ALL_TOKEN_SUMS = TOKEN_SUMS + ENGINE_SUMS + REFERENCE_SUMS
SEQUENCE_SUMS = ("sequences", "loss", "ratio_minus_one", "ratio_squared", "abs_log_ratio", "clipped")
PLAIN_LOG_RATIO = 100.0
"""Below it in size, squares of ratios and their sums are far from what float64 cannot hold."""
QUANTILES = {"p01": 0.01, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class MetricSums:
    """Sums of one or more micro-batches; ``+`` joins micro-batches. All float64.

    Across ranks: sum ``token`` over tensor, context and data ranks (each holds its own slice of the tokens), sum
    ``sequence`` over data ranks only (the others hold equal copies), and concatenate ``log_ratio_S`` over data ranks
    only.
    """

    token: torch.Tensor
    """[len(ALL_TOKEN_SUMS)] sums over this rank's response tokens."""
    sequence: torch.Tensor
    """[len(SEQUENCE_SUMS)] sums over responses."""
    log_ratio_S: torch.Tensor
    """log s_i of each response, for the quantiles."""

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(
            token=self.token + other.token,
            sequence=self.sequence + other.sequence,
            log_ratio_S=torch.cat([self.log_ratio_S, other.log_ratio_S]),
        )

    @staticmethod
    def zeros(device: torch.device | str = "cpu") -> MetricSums:
        """The sums of no micro-batch."""
        sizes = (len(ALL_TOKEN_SUMS), len(SEQUENCE_SUMS), 0)
        return MetricSums(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))


@torch.no_grad()
def minibatch_sums(
    shard: TokenShard, output: LossOutput, entropy_T: torch.Tensor, new_logprobs_T: torch.Tensor | None = None
) -> MetricSums:
    """The sums of one micro-batch.

    Args:
        shard: with ``old_logprobs_T``; with ``ref_logprobs_T``, the distance from the reference is measured too.
        output: what the loss returned for it.
        entropy_T: [T_local], nats; ignored where the mask is False.
        new_logprobs_T: [T_local], what the loss was given; without it nothing is measured against the reference.
    """
    counted_T = _counted(shard)
    token = torch.stack(
        [
            (output.clipped_low_T & counted_T).sum().double(),
            (output.clipped_high_T & counted_T).sum().double(),
            ((shard.advantages_T != 0) & counted_T).sum().double(),
            torch.where(counted_T, output.log_ratio_T, 0.0).double().square().sum(),
            torch.where(counted_T, entropy_T, 0.0).double().sum(),
        ]
    )
    real_S = shard.weights_S > 0
    log_ratio_S = output.log_ratio_S[real_S].double()
    ratio_minus_one_S = torch.expm1(log_ratio_S)
    sequence = torch.stack(
        [
            real_S.sum().double(),
            output.loss_S[real_S].double().sum(),
            ratio_minus_one_S.sum(),
            (1 + ratio_minus_one_S).square().sum(),
            log_ratio_S.abs().sum(),
            output.clipped_S[real_S].sum().double(),
        ]
    )
    reference = reference_sums(shard, new_logprobs_T)
    return MetricSums(torch.cat([token, engine_gap_sums(shard), reference]), sequence, log_ratio_S)


@torch.no_grad()
def engine_gap_sums(shard: TokenShard) -> torch.Tensor:
    """[4] float64, in the order of ENGINE_SUMS: the engine's mu against the trainer's pi_old, over response tokens."""
    counted_T = _counted(shard)
    bypassed = TokenShard.trainer_logprobs_T in shard
    old_T = shard.trainer_logprobs_T if bypassed else shard.old_logprobs_T
    old_T = torch.where(counted_T, old_T, 0.0).double()
    rollout_T = torch.where(counted_T, shard.rollout_logprobs_T, 0.0).double()
    log_rho_T = old_T - rollout_T
    k3_T = torch.expm1(log_rho_T) - log_rho_T
    tail_T = log_rho_T.abs() > math.log(2.0)
    return torch.stack([counted_T.sum().double(), -log_rho_T.sum(), k3_T.sum(), tail_T.sum().double()])


@torch.no_grad()
def reference_sums(shard: TokenShard, new_logprobs_T: torch.Tensor | None) -> torch.Tensor:
    """[3] float64, in the order of REFERENCE_SUMS: pi_theta against the reference, over response tokens; zeros without
    one."""
    counted_T = _counted(shard)
    if TokenShard.ref_logprobs_T not in shard or new_logprobs_T is None:
        return torch.zeros(len(REFERENCE_SUMS), dtype=torch.float64, device=counted_T.device)
    new_T = torch.where(counted_T, new_logprobs_T, 0.0).double()
    log_r_T = torch.where(counted_T, shard.ref_logprobs_T, 0.0).double() - new_T
    return torch.stack([counted_T.sum().double(), -log_r_T.sum(), k3(log_r_T).sum()])


def finish(sums: MetricSums) -> dict[str, float]:
    """The mini-batch's numbers from its complete sums (see the table above); empty when nothing was counted.

    Never raises: a number that float64 does not hold, or that is none, comes out as an infinity or a NaN.
    """
    token = dict(zip(ALL_TOKEN_SUMS, sums.token.tolist(), strict=True))
    sequence = dict(zip(SEQUENCE_SUMS, sums.sequence.tolist(), strict=True))
    n, m = token["tokens"], sequence["sequences"]
    if n == 0 or m == 0:
        return {}
    clipped = token["clipped_low"] + token["clipped_high"]
    mean_minus_one = sequence["ratio_minus_one"] / m
    with np.errstate(all="ignore"):
        ratios = 1.0 + np.quantile(np.expm1(sums.log_ratio_S.cpu().numpy()), list(QUANTILES.values()))
    return {
        "loss": sequence["loss"],
        "ratio/mean": 1.0 + mean_minus_one,
        **{f"ratio/{name}": float(ratio) for name, ratio in zip(QUANTILES, ratios, strict=True)},
        "ratio/abs_log_mean": sequence["abs_log_ratio"] / m,
        "ratio/token_log_rms": math.sqrt(token["log_ratio_squared"] / n),
        "ratio/ess": _effective_share(m, sequence, sums.log_ratio_S),
        "clip/frac_tokens": clipped / n,
        "clip/frac_low": token["clipped_low"] / n,
        "clip/frac_high": token["clipped_high"] / n,
        "clip/frac_sequences": sequence["clipped"] / m,
        "clip/frac_tokens_nonzero_adv": clipped / token["nonzero_advantage"] if token["nonzero_advantage"] else 0.0,
        "entropy": token["entropy"] / n,
        "kl/engine_k1": token["k1"] / n,
        "kl/engine_k3": token["k3"] / n,
        "kl/engine_tail": token["tail"] / n,
        **_against_reference(token),
    }


def _effective_share(m: float, sequence: Mapping[str, float], log_ratio_S: torch.Tensor) -> float:
    """(sum_i s_i)^2 / (m sum_i s_i^2) of m responses; in log space where a square would leave float64."""
    if bool((log_ratio_S.abs() < PLAIN_LOG_RATIO).all()):
        return (m + sequence["ratio_minus_one"]) ** 2 / (m * sequence["ratio_squared"])
    log_share = 2 * torch.logsumexp(log_ratio_S, 0) - torch.logsumexp(2 * log_ratio_S, 0)  # NaN if all are infinite
    return float(log_share.exp()) / m


def _against_reference(token: Mapping[str, float]) -> dict[str, float]:
    """``kl/ref_*``; absent without a reference."""
    n = token["ref_tokens"]
    return {f"kl/{name}": token[name] / n for name in REFERENCE_SUMS[1:]} if n else {}


def noise_floor(log_ratio_S: torch.Tensor) -> dict[str, float]:
    """Quantiles of |log s_i| between two evaluations at equal weights: what the clip range has to stand above; empty
    for no response."""
    if not log_ratio_S.numel():
        return {}
    p50, p99 = np.quantile(log_ratio_S.detach().abs().double().cpu().numpy(), [0.5, 0.99])
    return {"noise/abs_log_ratio_p50": float(p50), "noise/abs_log_ratio_p99": float(p99)}


def rollout_metrics(
    rewards_P: Sequence[np.ndarray],
    advantages_P: Sequence[np.ndarray],
    lengths_P: Sequence[np.ndarray],
    truncated_P: Sequence[np.ndarray],
    dropped: int,
) -> dict[str, float]:
    """The numbers of an outer step's surviving groups, over all data-parallel ranks.

    Args:
        rewards_P, advantages_P, lengths_P, truncated_P: one array [G_p] a group: rewards, A_i, response tokens, and
            whether the length limit cut the response.
        dropped: responses dropped before training.
    """
    metrics = {"dropped/responses": float(dropped)}
    if not rewards_P:
        return metrics
    rewards, advantages = np.concatenate(rewards_P), np.concatenate(advantages_P)
    lengths, truncated = np.concatenate(lengths_P), np.concatenate(truncated_P)
    metrics |= {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_std_groups": sum(map(is_zero_variance, rewards_P)) / len(rewards_P),
        "length/mean": float(lengths.mean()),
        "length/truncated": float(truncated.mean()),
    }
    for name, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        if chosen.any():
            metrics[f"length/mean_{name}"] = float(lengths[chosen].mean())
    return metrics


def _counted(shard: TokenShard) -> torch.Tensor:
    """[T_local] bool: response tokens of responses with weight > 0."""
    return shard.mask_T & expand(shard.weights_S > 0, shard.sequence_T)
