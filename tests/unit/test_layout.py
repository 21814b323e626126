"""How layers fall on pipeline stages, and which layouts and recompute settings are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_gspo.config import ModelConfig, ParallelConfig, ReplayConfig, RunConfig, parse
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.hf.catalog import FAMILIES
from megatron_gspo.hf.layout import check_recompute, check_replay, stage_layers

DENSE = FAMILIES["Qwen3ForCausalLM"].shape(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 67,
    }
)


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "expected"),
    [
        (5, 1, 1, (5,)),
        (48, 4, 1, (12, 12, 12, 12)),
        (5, 2, 1, (3, 2)),
        (4, 3, 1, (2, 1, 1)),
        (5, 2, 2, (2, 1, 1, 1)),  # ranks of 3 and 2
        (94, 4, 4, (6,) * 14 + (5, 5)),  # Qwen3-235B-A22B: ranks of 24, 24, 23, 23
    ],
)
def test_layers_are_spread_evenly_with_the_extra_ones_first(
    layers: int, pipeline: int, virtual: int, expected: tuple[int, ...]
) -> None:
    assert stage_layers(ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual), layers) == expected


@pytest.mark.parametrize("layers", range(16, 61))
def test_pipeline_ranks_differ_by_one_layer_at_most(layers: int) -> None:
    stages = stage_layers(ParallelConfig(pipeline=4, virtual_pipeline=4), layers)
    held = [sum(stages[rank::4]) for rank in range(4)]
    assert sum(held) == layers
    assert max(held) - min(held) <= 1


def test_named_stages_are_taken_as_they_are() -> None:
    assert stage_layers(ParallelConfig(pipeline=2, stage_layers=(0, 5)), 5) == (0, 5)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pipeline": 4, "virtual_pipeline": 2}, "5 layers over pipeline 4 x virtual_pipeline 2 = 8 stages"),
        ({"pipeline": 2, "stage_layers": (3, 3)}, "3 + 3 = 6, but the model has 5 layers"),
    ],
)
def test_stages_that_do_not_hold_the_model_are_refused_with_the_sum(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError) as error:
        stage_layers(ParallelConfig(**parallel), 5)
    assert message in str(error.value)


def tree(**sections: dict[str, Any]) -> RunConfig:
    base = {"model": {"path": "model"}, "data": {"path": "data"}, "train": {"run_dir": "run"}}
    return parse({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"virtual_pipeline": 2}, "virtual_pipeline = 2 cuts the stages of a pipeline, and pipeline = 1 has none"),
        ({"pipeline": 2, "stage_layers": [1, 2, 2]}, "names 3 virtual stages, but pipeline 2 x virtual_pipeline 1 = 2"),
        ({"tensor": 2, "expert": 2, "expert_tensor": 2, "data": 1}, "expert 2 x expert_tensor 2 = 4 does not divide"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        tree(parallel=parallel)


def test_virtual_stages_want_rounds_of_micro_batches() -> None:
    assert ParallelConfig(pipeline=4).microbatch_multiple == 1
    assert ParallelConfig(pipeline=4, virtual_pipeline=3).microbatch_multiple == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"recompute": "selective", "recompute_modules": []}, "recomputes nothing"),
        ({"recompute": "full", "recompute_modules": ["moe"]}, 'no effect with recompute = "full"'),
        ({"recompute_layers": 2}, 'recompute_layers = 2 has no effect with recompute = "off"'),
        ({"recompute": "selective", "recompute_method": "block"}, "recompute_method = 'block' has no effect"),
        ({"recompute": "selective", "recompute_modules": ["moe_act"]}, "recompute_modules.0 = 'moe_act'"),
    ],
)
def test_a_recompute_that_does_nothing_or_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tree(model=model)


def test_a_recompute_of_modules_that_the_model_lacks_is_refused() -> None:
    check_recompute(ModelConfig(path="model", recompute="selective"), ParallelConfig(), DENSE)
    with pytest.raises(ConfigError, match=r"\['moe'\] would recompute nothing: .* has core_attn, mlp"):
        check_recompute(
            ModelConfig(path="model", recompute="selective", recompute_modules=("moe",)), ParallelConfig(), DENSE
        )


def test_replay_of_a_dense_model_is_refused() -> None:
    check_replay(ReplayConfig(), DENSE)
    with pytest.raises(ConfigError, match=r"replay\.mode = 'r2', but Qwen3ForCausalLM .* is dense, and has no routes"):
        check_replay(ReplayConfig(mode="r2"), DENSE)
    with pytest.raises(ConfigError, match=r"replay\.engine_routes_every = 5, but"):
        check_replay(ReplayConfig(engine_routes_every=5), DENSE)


@pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
        ("block", 3, r"recompute_layers = 3, but the virtual pipeline stages have \[2, 2\] layers: use at most 2"),
        ("uniform", 3, r"recompute_layers = 3 does not divide .* stages, \[2, 2\]"),
    ],
)
def test_recomputed_layers_that_do_not_go_into_a_stage_are_refused(method: Any, layers: int, message: str) -> None:
    settings = ModelConfig(path="model", recompute="full", recompute_method=method, recompute_layers=layers)
    with pytest.raises(ConfigError, match=message):
        check_recompute(settings, ParallelConfig(pipeline=2), replace(DENSE, num_layers=4, moe_layers=(False,) * 4))
    check_recompute(settings, ParallelConfig(), replace(DENSE, num_layers=3, moe_layers=(False,) * 3))


def test_a_resolved_recompute_setting_reads_back() -> None:
    model = ModelConfig(path="model", recompute="selective", recompute_modules=("core_attn",))
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model
    assert ModelConfig.model_validate(ModelConfig(path="model").model_dump(mode="json")).recompute == "off"


def test_sequences_above_the_budget_need_leave_to_be() -> None:
    over = {"model": {"path": "m"}, "rollout": {"max_prompt_tokens": 1000, "max_response_tokens": 1000}}
    with pytest.raises(ConfigError, match=r'2000 does not fit .* or set train.oversize = "own"'):
        tree(**over, train={"microbatch_tokens": 1500})
    tree(**over, train={"microbatch_tokens": 1500, "oversize": "own"})
