"""Which matrices are in eight bits, which sizes servers take, and what local servers start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gspo import config
from megatron_gspo.config.servers import ServerSizes, server_sizes
from megatron_gspo.doctor.tensors import tensors_of
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.catalog import FAMILIES, read_model
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.fp8 import quantise
from megatron_gspo.hf.fp8_model import in_eight_bits, misfits, quantization_config, served_bytes, with_scales
from megatron_gspo.rollout.sglang.cards import EXPECTED, weight_bytes
from megatron_gspo.sync import gap
from megatron_gspo.train.engine_dtype import check_eight_bits, check_form, sent, sent_names, served_directory

QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
}
"""Sizes of the published directories, with fewer layers."""
QWEN2_MOE = QWEN3_30B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 5632,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def model_of(settings: dict[str, Any]) -> tuple[Family, ModelShape]:
    family = FAMILIES[settings["architectures"][0]]
    return family, family.shape(settings)


def kinds(family: Family, shape: ModelShape) -> tuple[set[str], set[str]]:
    """Last two parts of the names in eight bits, and of the others."""
    chosen = in_eight_bits(family, shape)
    found: tuple[set[str], set[str]] = (set(), set())
    for tensor in tensors_of(family, shape):
        found[not chosen(tensor.name)].add(".".join(tensor.name.removesuffix(".weight").split(".")[-2:]))
    return found


def test_matrices_of_attention_and_experts_are_in_eight_bits_and_nothing_else_is() -> None:
    projections = {f"self_attn.{name}_proj" for name in "qkvo"}
    experts = {f"{expert}.{name}_proj" for expert in range(128) for name in ("gate", "up", "down")}
    narrow, wide = kinds(*model_of(QWEN3_30B))
    assert narrow == projections | experts
    norms = {"self_attn.q_norm", "self_attn.k_norm", "0.input_layernorm", "0.post_attention_layernorm"}
    assert wide >= {"model.embed_tokens", "lm_head", "mlp.gate", "model.norm"} | norms


def test_latent_projections_and_shared_experts_are_in_eight_bits_as_deepseek_has_them() -> None:
    narrow, wide = kinds(*model_of(DEEPSEEK_V3))
    latent = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert latent | {"mlp.gate_proj", "shared_experts.down_proj"} <= narrow
    assert {"mlp.gate", "gate.e_score_correction_bias", "self_attn.q_a_layernorm"} <= wide
    chosen = in_eight_bits(*model_of(DEEPSEEK_V3))
    carried = "model.layers.61."
    assert chosen(f"{carried}mlp.experts.255.up_proj.weight")
    assert not chosen(f"{carried}eh_proj.weight") and not chosen(f"{carried}shared_head.head.weight")


def test_a_shared_experts_gate_stays_as_it_is_and_config_json_names_it() -> None:
    family, shape = model_of(QWEN2_MOE)
    gate = "model.layers.1.mlp.shared_expert_gate"
    assert not in_eight_bits(family, shape)(f"{gate}.weight")
    kept = quantization_config(family, shape)["modules_to_not_convert"]
    routers = {f"model.layers.{layer}.mlp.gate" for layer in range(2)}
    assert set(kept) == {"lm_head", gate, gate.replace(".1.", ".0.")} | routers


@pytest.mark.parametrize(
    ("settings", "sizes", "wrong"),
    [
        (QWEN3_30B, (1, 1, 1), []),
        (QWEN3_30B, (2, 2, 2), []),
        (QWEN3_30B, (8, 8, 1), []),
        (QWEN3_30B, (4, 4, 4), ["gate_proj.weight is 192 x 2048", "up_proj.weight is 192 x 2048"]),
        (QWEN3_30B | {"head_dim": 64}, (8, 8, 1), ["k_proj.weight is 64 x 2048", "v_proj.weight is 64 x 2048"]),
        (QWEN3_30B | {"hidden_size": 2000}, (1, 1, 1), ["q_proj.weight is 4096 x 2000"]),
        (DEEPSEEK_V3, (8, 8, 8), []),
        (DEEPSEEK_V3, (16, 16, 16), []),
        (DEEPSEEK_V3, (32, 32, 32), ["gate_proj.weight is 64 x 7168", "shared_experts.down_proj.weight is 7168 x 64"]),
        (DEEPSEEK_V3 | {"q_lora_rank": 1500}, (1, 1, 1), ["q_a_proj.weight is 1500 x 7168"]),
    ],
)
def test_sizes_that_cut_a_block_are_told(settings: dict[str, Any], sizes: tuple[int, ...], wrong: list[str]) -> None:
    attention, dense, experts = sizes
    found = misfits(*model_of(settings), attention=attention, dense=dense, experts=experts)
    assert [any(line.endswith(expected) for line in found) for expected in wrong] == [True] * len(wrong)
    assert bool(found) is bool(wrong)


NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate.weight")


def test_the_stream_has_scales_behind_their_matrices_and_all_else_in_bfloat16() -> None:
    family, shape = model_of(QWEN3_30B)
    own = {name: torch.randn(130, 256, generator=torch.Generator().manual_seed(0)) for name in NAMES}
    received = dict(sent("fp8", iter(own.items()), family, shape))
    matrix = NAMES[1]
    assert list(received) == [NAMES[0], matrix, f"{matrix}_scale_inv", NAMES[2]]
    assert set(received) == sent_names("fp8", set(own), family, shape) == with_scales(set(own), lambda n: n == matrix)
    narrow, scale = quantise(matrix, own[matrix])
    assert torch.equal(received[matrix].view(torch.uint8), narrow.view(torch.uint8))
    assert torch.equal(received[f"{matrix}_scale_inv"], scale)
    assert torch.equal(received[NAMES[0]], own[NAMES[0]].bfloat16())


SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 384,
    "moe_intermediate_size": 200,
    "vocab_size": 1000,
}
"""Matrices of which some end in a part of a block."""


@pytest.mark.parametrize("settings", [QWEN3_30B, QWEN2_MOE, QWEN3_30B | {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_what_servers_hold_is_as_many_bytes_as_the_stream_has(settings: dict[str, Any], dtype: str) -> None:
    family, shape = model_of(settings | SMALL | {"num_experts": 4, "shared_expert_intermediate_size": 130})
    own = {tensor.name: torch.zeros(tensor.shape) for tensor in tensors_of(family, shape)}
    streamed = sum(tensor.nbytes for _, tensor in sent(dtype, iter(own.items()), family, shape))
    assert served_bytes(family, shape, 2, eight_bits=dtype == "fp8") == streamed


def test_expert_biases_stay_in_float32() -> None:
    family, shape = model_of(DEEPSEEK_V3)
    bias = "model.layers.3.mlp.gate.e_score_correction_bias"
    value = torch.tensor([1.0, 1.0 + 2**-20])
    assert torch.equal(dict(sent("fp8", iter([(bias, value)]), family, shape))[bias], value)


def test_another_dtype_is_sent_as_before() -> None:
    family, shape = model_of(QWEN3_30B)
    own = {name: torch.ones(2, 2) for name in NAMES}
    assert {t.dtype for t in dict(sent("bfloat16", iter(own.items()), family, shape)).values()} == {torch.bfloat16}
    assert dict(sent("", iter(own.items()), family, shape)) == own
    assert sent_names("", set(own), family, shape) == set(own)


def test_a_matrix_that_is_refused_stops_no_other_rank() -> None:
    """The stream is exhausted first: producing it is collective."""
    drawn = []

    def tensors() -> Any:
        for name, value in (("a", 1.0), ("b", float("nan")), ("c", 1.0)):
            drawn.append(name)
            yield name, torch.full((2, 2), value)

    received: list[str] = []
    with pytest.raises(WeightError, match="b has elements that are not finite"):
        received.extend(name for name, _ in gap.in_eight_bits(tensors(), lambda name: True))
    assert drawn == ["a", "b", "c"] and received == ["a", "a_scale_inv"]


def run_config(model: Path, **rollout: Any) -> config.RunConfig:
    return config.parse(
        {
            "model": {"path": str(model)},
            "data": {"path": "unused"},
            "train": {"run_dir": "nowhere"},
            "rollout": {"engine_dtype": "fp8", **rollout},
        }
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN3_30B | {"dtype": "float32"}))
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    return directory


def test_local_servers_start_from_a_directory_that_asks_for_eight_bits(model: Path, tmp_path: Path) -> None:
    rollout = run_config(model).rollout
    served = served_directory(rollout, model, tmp_path / "servers", ServerSizes())
    assert served != model
    assert {path.name for path in served.iterdir()} == {"config.json", "generation_config.json", EXPECTED}
    assert weight_bytes(served, "fp8") == served_bytes(*read_model(model), 2, eight_bits=True) > 2 * 2 * 151936 * 2048
    written = json.loads((served / "config.json").read_text())
    asked = written.pop("quantization_config")
    assert written == json.loads((model / "config.json").read_text())
    assert asked["quant_method"] == "fp8" and asked["weight_block_size"] == [128, 128]
    assert asked["activation_scheme"] == "dynamic"
    assert read_model(served, dequantised=True)[1] == read_model(model)[1]
    check_form("fp8", "local", json.loads((served / "config.json").read_text()))
    plain = rollout.model_copy(update={"engine_dtype": "bfloat16"})
    assert served_directory(plain, model, tmp_path / "servers", ServerSizes()) == model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ""),
        (("--tp-size", "2"), ""),
        (("--tp-size", "4", "--ep-size", "4"), ""),
        (
            ("--tp-size", "4"),
            r"with 4 tensor rank\(s\), mlp.experts.gate_proj.weight is 192 x 2048, .*placement",
        ),
    ],
)
def test_servers_whose_ranks_would_cut_a_block_are_refused(model: Path, arguments: tuple[str, ...], said: str) -> None:
    rollout = run_config(model, server_args=arguments).rollout
    sizes = server_sizes(arguments)
    if not said:
        return check_eight_bits(rollout, model, *read_model(model), sizes)
    with pytest.raises(ConfigError, match=said):
        check_eight_bits(rollout, model, *read_model(model), sizes)
    return None


BLOCKS = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("dtype", "theirs", "asked", "said"),
    [
        ("fp8", BLOCKS, None, ""),
        ("fp8", BLOCKS, "fp8", ""),
        ("fp8", {}, None, ""),  # their config.json is not on this machine
        ("fp8", {"hidden_size": 1}, None, "holds no matrices of eight bits"),
        ("fp8", {"hidden_size": 1}, "fp8", "holds no matrices of eight bits"),
        ("fp8", {"quantization_config": {"quant_method": "awq"}}, None, "holds no matrices of eight bits"),
        ("", {"hidden_size": 1}, None, ""),
        ("", BLOCKS, None, r"quantises its weights \(fp8\), and would be sent those of model.dtype"),
        ("bfloat16", {}, "fp8", r"quantises its weights \(fp8\), and would be sent bfloat16"),
    ],
)
def test_servers_of_weights_in_another_form_are_refused(
    dtype: str, theirs: dict[str, Any], asked: str | None, said: str
) -> None:
    if not said:
        return check_form(dtype, "http://a", theirs, asked)
    with pytest.raises(ConfigError, match=f"http://a {said}"):
        check_form(dtype, "http://a", theirs, asked)
    return None
