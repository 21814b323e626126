"""A run learns from an engine that computes the trainer's model, and from no other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_gspo.config import RunConfig, parse
from megatron_gspo.errors import EngineMismatchError
from megatron_gspo.sync.head import with_head
from megatron_gspo.train.engine_gate import EngineGate, Gap, make_gate

SOUND, OTHER = Gap(tokens=100, k3=1e-12, tail=0.0), Gap(tokens=100, k3=3.2, tail=0.97)


def config(model: dict[str, str] | None = None, **sections: dict[str, object]) -> RunConfig:
    tree = {"model": {"path": "m", **(model or {})}, "data": {"path": "d"}, "train": {"run_dir": "r"}}
    return parse(tree | sections)


@pytest.mark.parametrize(
    ("model", "sections", "limit"),
    [
        ({"dtype": "float32"}, {}, 1e-3),
        ({"dtype": "float64"}, {}, 1e-3),  # the engine computes in float32
        ({"dtype": "bfloat16"}, {}, 0.1),
        ({"dtype": "float32"}, {"rollout": {"engine_dtype": "bfloat16"}}, 0.1),
        ({"dtype": "bfloat16"}, {"rollout": {"engine_dtype": "float32"}}, 1e-3),
        ({"dtype": "bfloat16"}, {"rollout": {"engine_dtype": "fp8"}}, 0.3),
        ({"dtype": "float32"}, {"sync": {"router_noise": 0.01}}, 0.1),
        ({"dtype": "float32"}, {"rollout": {"max_engine_k3": 0.5}, "sync": {"router_noise": 0.01}}, 0.5),
        ({"dtype": "float32"}, {"rollout": {"max_engine_k3": 0}}, None),
    ],
)
def test_the_limit_is_that_of_the_engines_dtype_unless_it_is_set(
    model: dict[str, str], sections: dict[str, dict[str, object]], limit: float | None
) -> None:
    assert config(model, **sections).engine_k3_limit == limit
    assert make_gate(config(model, **sections)).limit == limit


def test_another_model_in_the_first_step_ends_the_run_and_says_what_to_look_at() -> None:
    with pytest.raises(EngineMismatchError) as caught:
        EngineGate(1e-3, stops=False).judge(OTHER, outer_step=0)
    assert "kl/engine_k3 is 3.2 nats per token over 100 tokens, above 0.001, and 97% of the tokens" in str(caught.value)
    assert "docs/sync.md" in str(caught.value)


@pytest.mark.parametrize("k3", [math.nan, math.inf])
def test_what_is_no_distance_ends_it_too(k3: float) -> None:
    with pytest.raises(EngineMismatchError):
        EngineGate(1e-3, stops=False).judge(replace(SOUND, k3=k3), outer_step=0)


def test_the_first_step_is_the_first_with_tokens_to_compare() -> None:
    gate = EngineGate(1e-3, stops=False)
    assert gate.judge(Gap(0, 0.0, 0.0), outer_step=0) is None
    with pytest.raises(EngineMismatchError):
        gate.judge(OTHER, outer_step=1)


def test_a_later_drift_is_warned_of_once_until_it_is_over() -> None:
    gate = EngineGate(1e-3, stops=False)
    said = [gate.judge(gap, step) for step, gap in enumerate([SOUND, OTHER, OTHER, SOUND, OTHER])]
    assert [bool(warning) for warning in said] == [False, True, False, False, True]
    assert said[1] is not None and said[1].startswith("warning: outer step 2: the engine's logprobs are not")


def test_a_later_drift_ends_the_run_where_that_is_asked_for() -> None:
    gate = make_gate(config(rollout={"on_engine_drift": "stop"}))
    assert gate.judge(SOUND, outer_step=0) is None
    with pytest.raises(EngineMismatchError, match="outer step 2"):
        gate.judge(OTHER, outer_step=1)


def test_logprobs_that_are_not_computed_end_it_in_any_step_and_those_of_a_policy_that_is_sure_do_not() -> None:
    gate = EngineGate(1e-3, stops=False)
    assert gate.judge(replace(SOUND, uncertain=0.0), outer_step=0) is None
    with pytest.raises(EngineMismatchError, match="all 100 tokens are exactly 0"):
        gate.judge(replace(OTHER, uncertain=0.0), outer_step=1)


def test_a_gate_without_a_limit_compares_nothing() -> None:
    gate = EngineGate(None, stops=True)
    assert gate.judge(OTHER, outer_step=0) is None


def test_a_head_that_is_tied_goes_out_once_more_in_memory_of_its_own() -> None:
    embedding, other = torch.ones(3, 2), torch.zeros(2)
    sent = list(with_head(iter([("model.embed_tokens.weight", embedding), ("model.norm.weight", other)])))
    assert [name for name, _ in sent] == ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert torch.equal(sent[1][1], embedding) and sent[1][1].data_ptr() != embedding.data_ptr()
