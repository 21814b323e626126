"""Generalised advantages and the value loss, against loops over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.gae import ValueScale, generalised_advantages, lambdas, value_loss
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.config import parse
from megatron_gspo.errors import ConfigError
from tests.unit.algorithm_cases import Case, cases


def naive(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """sum_k (gamma lambda)^k delta_{t+k}, written out."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * later - v for r, v, later in zip(rewards, values, after, strict=True)]
    return np.array([sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))])


@given(case=cases(), gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_advantages_are_sums_of_discounted_errors_over_the_trained_tokens(
    case: Case, gamma: float, lam: float, seed: int
) -> None:
    shard, _ = case.shard(multiple=4, masked_value=float("nan"))
    rng = np.random.default_rng(seed)
    rewards, values = (torch.from_numpy(rng.normal(size=shard.num_tokens)) for _ in range(2))
    rewards[~shard.mask_T] = values[~shard.mask_T] = float("nan")  # of prompts, of an environment, of padding
    lam_S = torch.full((shard.num_sequences,), lam, dtype=torch.float64)
    found = generalised_advantages(rewards, values, shard.mask_T, shard.sequence_T, gamma=gamma, lam_S=lam_S)
    assert (found[~shard.mask_T] == 0).all()
    for index in range(shard.num_sequences):
        own = shard.mask_T & (shard.sequence_T == index)
        expected = naive(rewards[own].numpy(), values[own].numpy(), gamma, lam)
        np.testing.assert_allclose(found[own].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_with_gamma_and_lambda_1_an_advantage_is_the_reward_to_go_less_the_value() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 0.5]).double(), torch.tensor([0.3, 0.2, 0.1, 0.4]).double()
    ones, sequence = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 0, 1])
    found = generalised_advantages(rewards, values, ones, sequence, gamma=1.0, lam_S=torch.ones(2).double())
    assert found.tolist() == pytest.approx([0.7, 0.8, 0.9, 0.1])


def test_nothing_is_learnt_of_a_batch_without_a_trained_token() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    found = generalised_advantages(
        torch.ones(3), torch.ones(3), nothing, torch.full((3,), 1), gamma=1.0, lam_S=torch.ones(1).double()
    )
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_lambda_grows_with_the_length_where_that_is_asked_for() -> None:
    lengths = torch.tensor([1, 100, 1000])
    assert lambdas(lengths, 0.9, None).tolist() == [0.9] * 3
    assert lambdas(lengths, 0.9, 0.05).tolist() == pytest.approx([0.0, 0.8, 0.98])


@given(case=cases(), clip=st.none() | st.floats(0.05, 0.5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_value_loss_is_that_of_its_formula_and_so_is_its_gradient(
    case: Case, clip: float | None, seed: int
) -> None:
    shard, _ = case.shard(multiple=4, masked_value=float("nan"))
    rng = np.random.default_rng(seed)
    new, old, returns = (torch.from_numpy(rng.normal(size=shard.num_tokens)) for _ in range(3))
    new[~shard.mask_T] = float("nan")
    new.requires_grad_()
    output = value_loss(shard.replace(values_T=old, returns_T=returns), new, clip, segment_sum)
    expected, slopes, clipped = 0.0, torch.zeros(shard.num_tokens, dtype=torch.float64), []
    for t in shard.mask_T.nonzero()[:, 0].tolist():
        i = int(shard.sequence_T[t])
        share = float(shard.weights_S[i]) / int(shard.lengths_S[i])
        v, o, r = float(new[t].detach()), float(old[t]), float(returns[t])
        bounded = v if clip is None else o + min(max(v - o, -clip), clip)
        beyond = clip is not None and abs(v - o) > clip and (bounded - r) ** 2 > (v - r) ** 2
        expected += share * (bounded - r if beyond else v - r) ** 2 / 2
        slopes[t] = 0.0 if beyond else share * (v - r)
        clipped += [t] if beyond else []
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, new)
    torch.testing.assert_close(gradient, slopes.to(gradient.dtype), rtol=1e-9, atol=1e-12)
    assert output.clipped_T.nonzero()[:, 0].tolist() == clipped


def test_a_scale_of_values_is_the_mean_and_deviation_of_what_it_has_seen() -> None:
    scale = ValueScale()
    assert (scale.mean, scale.std) == (0.0, 1.0)
    for _ in range(5):
        scale.update(mean=3.0, square=13.0)
    assert (scale.mean, scale.std) == pytest.approx((3.0, 2.0))
    scale.update(mean=5.0, square=25.0)
    assert 3.0 < scale.mean < 5.0
    assert ValueScale().std == 1.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["critic.lam=0.9"], 'critic.lam = 0.9 has no effect: there is a critic with algorithm.credit = "gae"'),
        (['algorithm.credit="gae"'], "gspo has one term per sequence: use a loss with a term for each token"),
        (['algorithm.name="ppo"', 'algorithm.credit="gae"', "critic.min_lr=1.0"], "critic.min_lr = 1 is above"),
        (["algorithm.kl_reward_coef=0.1", 'rollout.on_truncated="mask"'], "keeps truncated responses out of that"),
        (["rollout.group_size=1"], "one alone has advantage 0"),
        (['algorithm.name="ppo"', 'algorithm.credit="gae"', "critic.gamma=0"], "critic.gamma"),
    ],
)
def test_settings_of_a_critic_that_cannot_be_are_one_line(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}}, overrides=settings)


def test_with_a_critic_one_response_to_a_prompt_is_enough() -> None:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}}
    config = parse(tree, overrides=['algorithm.name="ppo"', 'algorithm.credit="gae"', "rollout.group_size=1"])
    assert config.algorithm.passes == ("values",)
