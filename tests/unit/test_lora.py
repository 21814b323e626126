"""Adapters before there is a model: their settings, which matrices they stand on, and what they are called."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_gspo.config import LoraConfig, RunConfig, parse
from megatron_gspo.doctor.estimate import estimate
from megatron_gspo.doctor.tensors import adapters_of, tensors_of
from megatron_gspo.errors import ConfigError, SyncError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.lora import every_adapter, leaf_names, lora_targets, matches, merge
from megatron_gspo.hf.peft import adapter_config, check_adapters, write_adapter_config
from megatron_gspo.parity.models import make_model
from megatron_gspo.sync.base import BucketSync

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def configuration(**sections: dict[str, object]) -> RunConfig:
    tree = {"model": {"path": "model"}, "data": {"path": "data"}, "train": {"run_dir": "run"}}
    return parse({**tree, **sections})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("tiny-moe", "tiny-mixtral", "tiny-qwen2-moe", "tiny-deepseek-v3", "tiny-moonlight")
    return {name: make_model(name, tmp_path_factory.mktemp(name) / "model", 0) for name in names}


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": -1}, "rank"),
        ({"rank": 8, "alpha": 0.0}, "alpha"),
        ({"alpha": 8.0}, "alpha = 8.0 has no effect with rank = 0"),
        ({"targets": ["q_proj"]}, "has no effect with rank = 0"),
        ({"rank": 8, "targets": []}, "targets = [] adapts nothing"),
        ({"rank": 8, "targets": ["q_proj", "q_proj"]}, "targets names q_proj more than once"),
        ({"rank": 8, "targets": ["all-linear", "q_proj"]}, '"all-linear" stands alone'),
        ({"rank": 8, "dropout": 0.1}, "dropout"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, said):
    with pytest.raises(ConfigError) as refused:
        configuration(lora=settings)
    assert said in str(refused.value)


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0
    assert LoraConfig().rank == 0


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny-moe", ATTENTION + MLP),
        ("tiny-mixtral", [*ATTENTION, "w1", "w3", "w2"]),
        ("tiny-qwen2-moe", ATTENTION + MLP),
        ("tiny-deepseek-v3", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP]),
        ("tiny-moonlight", ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP]),
    ],
)
def test_all_linear_is_every_matrix_of_attention_mlps_and_experts(models, model, expected):
    family, shape = read_model(models[model])
    assert leaf_names(lora_targets(family, shape, LoraConfig(rank=2))) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gate", '"gate" of Qwen3MoeForCausalLM gets no adapter'),
        ("embed_tokens", "gets no adapter"),
        ("lm_head", "gets no adapter"),
        ("q_norm", "gets no adapter"),
        ("q_a_proj", 'Qwen3MoeForCausalLM with these layers has no matrix "q_a_proj": it has q_proj, k_proj'),
        ("proj", 'no matrix "proj"'),
        ("shared_experts.up_proj", 'no matrix "shared_experts.up_proj"'),
    ],
)
def test_what_is_no_target_is_refused_by_name(models, name, said):
    family, shape = read_model(models["tiny-moe"])
    with pytest.raises(ConfigError) as refused:
        lora_targets(family, shape, LoraConfig(rank=2, targets=("q_proj", name)))
    assert said in str(refused.value)


def test_a_target_may_say_whose_matrix_it_is(models):
    family, shape = read_model(models["tiny-qwen2-moe"])

    def weights(*targets: str) -> list[str]:
        return [target.weight for target in lora_targets(family, shape, LoraConfig(rank=2, targets=targets))]

    layer = "model.layers.{layer}.mlp"
    assert weights("experts.up_proj") == [f"{layer}.experts.{{expert}}.up_proj.weight"]
    assert weights("shared_expert.down_proj") == [f"{layer}.shared_expert.down_proj.weight"]
    assert len(weights("up_proj")) == 2 + (not all(shape.moe_layers))
    assert matches("model.layers.3.mlp.experts.17.up_proj.weight", "experts.up_proj")
    assert not matches("model.layers.3.self_attn.q_proj.weight", "proj")


def test_a_layer_has_the_adapters_of_the_matrices_that_it_has(models):
    family, shape = read_model(models["tiny-moe"])
    names = [each.name for each in every_adapter(family, shape, LoraConfig(rank=2))]
    assert len(names) == len(set(names))
    dense = [name for name in names if "model.layers.0." in name]
    assert len(dense) == 2 * 7 and not any(".experts." in name for name in dense)
    moe = [name for name in names if "model.layers.1." in name]
    assert len(moe) == 2 * (4 + 3 * shape.num_experts)
    (shape_b,) = {e.shape for e in every_adapter(family, shape, LoraConfig(rank=2)) if e.name == dense[1]}
    assert shape_b == (shape.num_attention_heads * shape.head_dim, 2)


# ------------------------------------------------------------------------------------------------------------ merging


def test_a_weight_is_merged_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*size, generator=generator).bfloat16() for size in ((96, 64), (8, 64), (96, 8)))
    expected = (weight.double() + 0.37 * b.double() @ a.double()).bfloat16()
    rounded = merge(weight, a, b, 0.37)
    assert rounded.dtype == torch.bfloat16
    assert (rounded != expected).float().mean() < 1e-3, "but where float32 is on the other side of a tie"
    twice = weight + 0.37 * (b @ a)
    assert (twice != expected).float().mean() > 0.01, "another rounding would show"


# --------------------------------------------------------------------------------------------------------- PEFT's files


def test_the_settings_of_saved_adapters_are_pefts(models, tmp_path):
    family, shape = read_model(models["tiny-moe"])
    lora = LoraConfig(rank=4, alpha=6.0, rslora=True)
    assert adapter_config(family, shape, lora, "base") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 6.0,
        "use_rslora": True,
        "target_modules": sorted(ATTENTION + MLP),
        "target_parameters": sorted(f"mlp.{name}.weight" for name in MLP),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    of_experts = adapter_config(family, shape, LoraConfig(rank=4, targets=("experts.up_proj",)), "base")
    assert of_experts["target_modules"] == r".*\b(model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj)"
    write_adapter_config(tmp_path, family, shape, lora, "base")
    check_adapters(tmp_path, family, shape, lora)
    for other, said in (
        (replaced(lora, rank=8), "r = 4, and lora.rank = 8"),
        (replaced(lora, alpha=7.0), "lora_alpha = 6.0, and lora.alpha = 7.0"),
        (replaced(lora, rslora=False), "use_rslora = True, and lora.rslora = False"),
        (replaced(lora, targets=("q_proj",)), "lora.targets stands for ['q_proj']"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_adapters(tmp_path, family, shape, other)
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "no adapters in PEFT's layout"),
        ([], "is not that of low-rank adapters"),
        ({"peft_type": "IA3"}, "is not that of low-rank adapters"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "use_dora": True}, "use_dora = True is not supported"),
    ],
)
def test_adapters_that_are_of_another_kind_are_refused(models, tmp_path, given, said):
    family, shape = read_model(models["tiny-moe"])
    if given is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    with pytest.raises(ConfigError) as refused:
        check_adapters(tmp_path, family, shape, LoraConfig(rank=4))
    assert said in str(refused.value)


def replaced(lora: LoraConfig, **settings: object) -> LoraConfig:
    return LoraConfig(**{**lora.model_dump(), **settings})


# -------------------------------------------------------------------------------------------------------------- memory


def test_doctor_counts_gradients_and_optimizer_states_of_adapters_alone(models):
    family, shape = read_model(models["tiny-moe"])
    plain = configuration(algorithm={"kl_loss_coef": 0.1})
    adapted = configuration(lora={"rank": 4}, algorithm={"kl_loss_coef": 0.1})
    tensors = tuple(tensors_of(family, shape))
    adapters = tuple(adapters_of(family, shape, adapted.lora))
    of_model = sum(math.prod(tensor.shape) for tensor in tensors)
    of_adapters = sum(math.prod(tensor.shape) for tensor in adapters)
    assert 0.05 * of_model < of_adapters < 0.5 * of_model
    whole = estimate(plain, shape, tensors, data_size=1, stage=0)
    low = estimate(adapted, shape, tensors, data_size=1, stage=0, adapters=adapters)
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * of_model, 4 * of_model, 8 * of_model)
    assert low.weights == 4 * (of_model + of_adapters)
    assert (low.gradients, low.optimizer) == (4 * of_adapters, 8 * of_adapters)
    assert (whole.reference, low.reference) == (4 * of_model, 0)


def test_expert_adapters_are_shared_out_over_expert_ranks(models):
    family, shape = read_model(models["tiny-moe"])
    config = configuration(lora={"rank": 4, "targets": ["experts.up_proj"]}, parallel={"expert": 2})
    adapters = tuple(adapters_of(family, shape, config.lora))
    assert all(adapter.is_expert for adapter in adapters)
    mine = estimate(config, shape, tuple(tensors_of(family, shape)), data_size=2, stage=0, adapters=adapters)
    assert mine.gradients == 4 * sum(math.prod(adapter.shape) for adapter in adapters) // 2


# ---------------------------------------------------------------------------------------------------------------- sync


class Recorded(BucketSync):
    """A sync that sends nowhere and keeps the names of each push."""

    def __init__(self, verify: str = "first", *, fails: bool = False) -> None:
        from megatron_gspo.config import SyncConfig
        from megatron_gspo.sync.peers import Peers
        from megatron_gspo.types import OPEN

        self.config, self.peers, self.pushes, self.fails = SyncConfig(verify=verify), Peers(), [], fails
        self.access, self.expected_names = OPEN, frozenset({"a", "b", "c"})

    def _start(self, version, *, verifying, whole):
        return ""

    def _complete(self, place, version, sent, expected):
        from megatron_gspo.sync.base import check_names

        names = [name for rank in sent for names, _ in rank for name in names]
        check_names(names, expected)
        if self.fails:
            raise SyncError("a server is gone")
        self.pushes.append(sorted(names))
        return ""

    def _send(self, place, bucket):
        return ""


def tensors(*names):
    return iter([(name, torch.zeros(2)) for name in names])


def test_servers_get_everything_once_and_then_what_changed():
    sync = Recorded()
    assert sync.wants_all
    with pytest.raises(SyncError, match="have no others yet"):
        sync.push(tensors("b"), 0, {"b"})
    sync.push(tensors("a", "b", "c"), 0)
    assert not sync.wants_all
    sync.push(tensors("b"), 1, {"b"})
    with pytest.raises(SyncError, match="missing"):
        sync.push(tensors("b"), 2, {"b", "c"})
    assert sync.wants_all, "a push that failed has left servers with half of it"
    assert sync.pushes == [["a", "b", "c"], ["b"]]


def test_servers_whose_weights_are_overwritten_to_verify_want_everything_each_time():
    sync = Recorded(verify="every")
    sync.push(tensors("a", "b", "c"), 0)
    assert sync.wants_all


def test_a_full_push_that_fails_fills_nothing():
    sync = Recorded(fails=True)
    with pytest.raises(SyncError, match="a server is gone"):
        sync.push(tensors("a", "b", "c"), 0)
    assert sync.wants_all
