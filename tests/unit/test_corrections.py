"""Corrections for the engine gap, against loops over tokens."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.importance import correct, rule_named
from megatron_gspo.algorithm.objective import objective, without_far_off
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.config import parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.types import PlacedSample
from tests.unit.algorithm_cases import Case, cases

RULES = ("truncate", "clip", "mask", "drop")


def naive_weights(case: Case, settings: Correction) -> list[list[float]]:
    """By response and token, from the formulas of docs/corrections.md."""
    weights = []
    for sample, old_R in zip(case.samples, case.old, strict=True):
        logs = [float(o) - float(m) for o, m in zip(old_R, sample.rollout_logprobs, strict=True)]
        total, mean = math.exp(sum(logs)), math.exp(sum(logs) / len(logs))
        estimate = {
            "k1": [abs(x) for x in logs],
            "k2": [x * x / 2 for x in logs],
            "k3": [math.exp(x) - 1 - x for x in logs],
        }.get(settings.reject, [0.0] * len(logs))
        row = []
        for x, own in zip(logs, estimate, strict=True):
            rho = {"token": math.exp(x), "sequence": total, "geometric": mean}[settings.level]
            inside = settings.low <= rho <= settings.high
            weight = {
                "off": 1.0,
                "truncate": min(rho, settings.high),
                "clip": min(max(rho, settings.low), settings.high),
                "mask": rho if inside else 0.0,
                "drop": float(inside),
            }[settings.rule]
            distance = own if settings.reject_level == "token" else sum(estimate) / len(estimate)
            if settings.reject != "off" and distance > settings.reject_above:
                weight = 0.0
            if min(map(math.exp, logs)) < settings.veto:
                weight = 0.0
            row.append(weight)
        weights.append(row)
    return weights


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("rule", ["off", *RULES])
@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=15)
def test_weights_are_those_of_the_formulas(rule: str, level: str, case: Case, data: st.DataObject) -> None:
    low, high = data.draw(st.floats(0.0, 0.95)), data.draw(st.floats(1.01, 4.0))
    reject = data.draw(st.sampled_from(["off", "k1", "k2", "k3"]))
    chosen: dict[str, Any] = {"rule": rule, "level": level, "low": low, "high": high, "reject": reject}
    chosen |= {"reject_level": data.draw(st.sampled_from(["token", "sequence"]))}
    chosen |= {"reject_above": data.draw(st.floats(0.01, 0.5)), "veto": data.draw(st.sampled_from([0.0, 0.4]))}
    given_settings = Correction(**chosen)
    shard, _ = case.shard(multiple=4, masked_value=float("nan"))
    found = correct(shard, given_settings, segment_sum)
    expected = [weight for row in naive_weights(case, given_settings) for weight in row]
    torch.testing.assert_close(
        found.weights_T[shard.mask_T], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert (found.weights_T[~shard.mask_T] == 1).all() and (found.log_rho_T[~shard.mask_T] == 0).all()


@pytest.mark.parametrize("name", ["gspo", "gspo-token", "grpo", "cispo", "gmpo", "sapo", "luspo", "vespo", "dppo"])
@given(case=cases())
@settings(deadline=None, max_examples=15)
def test_a_weight_on_a_whole_response_scales_its_part_of_every_loss(name: str, case: Case) -> None:
    shard, new_T = case.shard()
    algorithm = make_algorithm(name)
    plain = objective(algorithm, shard, new_T, segment_sum)
    weights_S = torch.linspace(0.0, 2.0, shard.num_sequences, dtype=torch.float64)
    weighed = shard.replace(corrections_T=weights_S[shard.sequence_T], corrections_S=weights_S)
    output = objective(algorithm, weighed, new_T, segment_sum)
    torch.testing.assert_close(output.loss_S, plain.loss_S * weights_S, rtol=1e-12, atol=1e-14)


@given(case=cases())
@settings(deadline=None, max_examples=20)
def test_a_token_that_is_left_out_has_no_gradient_of_its_own_in_a_loss_of_tokens(case: Case) -> None:
    shard, new_T = case.shard()
    left_out_T = shard.mask_T & (torch.arange(len(shard.mask_T)) % 2 == 0)
    weighed = shard.replace(corrections_T=torch.where(left_out_T, 0.0, 1.0).double(), corrections_S=shard.weights_S)
    leaf_T = new_T.detach().requires_grad_()
    (gradient_T,) = torch.autograd.grad(objective(make_algorithm("grpo"), weighed, leaf_T, segment_sum).loss, leaf_T)
    assert not gradient_T[left_out_T].any()


@given(case=cases())
@settings(deadline=None, max_examples=30)
def test_off_policy_sequences_are_masked_where_they_are_worse_and_far_off(case: Case) -> None:
    shard, new_T = case.shard(multiple=4, masked_value=float("nan"))
    masked = without_far_off(shard, new_T, segment_sum, 0.01)
    for index, (new, old, s) in enumerate(zip(case.new, case.old, case.samples, strict=True)):
        far = s.advantage < 0 and float((old - new.detach()).mean()) > 0.01
        assert masked.weights_S[index].item() == (0.0 if far else s.weight)


def own_rule(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.full_like(log_rho, 0.25)


def test_a_rule_of_ones_own_is_named_by_its_module() -> None:
    assert rule_named(f"{__name__}:own_rule") is own_rule
    with pytest.raises(ConfigError, match=r'correction.rule = "os:nothing": AttributeError'):
        rule_named("os:nothing")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"rule": "truncated"}, r'rule = "truncated" is no rule \(known: off, truncate, clip, mask, drop'),
        ({"low": 2.0, "high": 2.0}, "low = 2 is not below high = 2"),
        ({"rule": "mask", "bypass": True}, "have nothing to correct"),
        ({"veto": -1.0}, r"correction.veto = -1.0: .*greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(section: dict[str, Any], said: str) -> None:
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}, "correction": section}
    with pytest.raises(ConfigError, match=said) as caught:
        parse(tree)
    assert "\n" not in str(caught.value)


def test_the_sum_over_a_long_response_stays_within_what_its_exponential_holds() -> None:
    rest = {"rollout_logprobs": np.full(400, -2.0), "advantage": 1.0, "token_advantages": np.ones(400), "weight": 1.0}
    sample = PlacedSample.of_response(np.zeros(1), np.zeros(400), group=0, sample=0, **rest)
    nothing, old = torch.zeros(400, dtype=torch.float64), torch.full((400,), -1.0, dtype=torch.float64)
    shard, _ = Case([sample], [nothing], [old], [nothing], 0.1, 0.1).shard()
    settings = Correction(rule="clip", level="sequence", low=0.0, high=1e12)
    assert correct(shard, settings, segment_sum).weights_T.max().item() == pytest.approx(math.exp(20))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tools/corrections.py`` on 3 tokens and responses of 3."""
    path = Path(__file__).parents[2] / "tools" / "corrections.py"
    spec = importlib.util.spec_from_file_location("corrections_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "corrections_tool", module)
    spec.loader.exec_module(module)
    module.VOCABULARY, module.LENGTH = 3, 3
    return module


def test_the_product_over_a_response_takes_the_gap_back_exactly_and_bounds_bring_bias(small: Any) -> None:
    """Over every possible response: the mean of the corrected gradient is the gradient on the policy's own
    distribution, whatever the engine's."""
    found = small.measure(0.5)
    assert found["none"][0] > 0.1
    assert found["truncate, sequence, no bound"][0] < 1e-12
    assert 0 < found["truncate, sequence, 2"][0] < found["none"][0]
    assert found["truncate, sequence, no bound"][1] > found["truncate, sequence, 2"][1]


def test_bias_and_spread_are_those_of_single_responses_gradients(small: Any) -> None:
    """Each response's gradient by itself, in the table's logits, and their moments over what the engine draws."""
    policy, mu_RL, rewards_R = small.problem(0.5)
    pi_RL = policy.logprobs_RL
    pi_R, mu_R = pi_RL.sum(1).exp(), mu_RL.sum(1).exp()
    advantages_R = rewards_R - (pi_R * rewards_R).sum()
    settings = Correction(**small.RULES["truncate, token, 2"])
    terms_RL = (pi_RL - mu_RL).exp().clamp(max=2.0) * advantages_R[:, None]
    plain, corrected = (
        torch.stack([single_gradient(small, policy, r, terms_L) for r, terms_L in enumerate(weights_RL)])
        for weights_RL in (advantages_R[:, None].expand_as(pi_RL), terms_RL)
    )
    exact, mean = (pi_R[:, None] * plain).sum(0), (mu_R[:, None] * corrected).sum(0)
    variance = (mu_R[:, None] * (corrected - mean).square()).sum()
    bias, spread = small.measure(0.5)["truncate, token, 2"]
    assert bias == pytest.approx(float((mean - exact).norm() / exact.norm()), rel=1e-10)
    assert spread == pytest.approx(float(variance.sqrt() / exact.norm()), rel=1e-10)
    torch.testing.assert_close(small.coefficients(pi_RL, mu_RL, advantages_R, settings), terms_RL)


def single_gradient(small: Any, policy: Any, index: int, weights_L: torch.Tensor) -> torch.Tensor:
    logprobs_L = small.table_logprobs(policy.logits, policy.responses[index : index + 1])[0]
    (gradient,) = torch.autograd.grad((weights_L * logprobs_L).sum(), policy.logits)
    return gradient.flatten()
