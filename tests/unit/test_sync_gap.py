"""The engine gap that is made on purpose: what reaches the servers, and what stays as it is."""

from __future__ import annotations

import pytest
import torch

from megatron_gspo.hf.catalog import FAMILIES
from megatron_gspo.sync.gap import in_dtype, with_router_noise

SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 13, "num_attention_heads": 4, "intermediate_size": 96}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
MOE = {"architectures": ["Qwen3MoeForCausalLM"]} | SIZES | EXPERTS
ROUTER, EXPERT = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: (3 * torch.randn(64, 64, generator=generator)).to(dtype) for name in (EXPERT, ROUTER)}


def sent(
    own: dict[str, torch.Tensor], *, seed: int = 0, version: int = 0, relative: float = 0.02
) -> dict[str, torch.Tensor]:
    return dict(with_router_noise(iter(own.items()), {ROUTER}, relative=relative, seed=seed, version=version))


def test_noise_is_relative_to_a_routers_rms_and_touches_nothing_else() -> None:
    own = tensors()
    before = {name: tensor.clone() for name, tensor in own.items()}
    received = sent(own)
    assert list(received) == list(own)
    assert received[EXPERT] is own[EXPERT]
    noise = received[ROUTER] - own[ROUTER]
    rms = own[ROUTER].square().mean().sqrt()
    assert noise.square().mean().sqrt() / rms == pytest.approx(0.02, rel=0.05)  # 4,096 draws: +-1.1%
    assert abs(noise.mean() / rms) < 0.02 * 4 / 64
    for name in own:
        assert torch.equal(own[name], before[name]), "the trainer's weights moved"


def test_noise_is_a_function_of_seed_name_and_weight_version() -> None:
    own = tensors()
    first = sent(own)[ROUTER]
    assert torch.equal(first, sent(own)[ROUTER])
    assert not torch.equal(first, sent(own, seed=1)[ROUTER])
    assert not torch.equal(first, sent(own, version=1)[ROUTER])
    other = "model.layers.2.mlp.gate.weight"
    renamed = with_router_noise(iter({other: own[ROUTER]}.items()), {other}, relative=0.02, seed=0, version=0)
    assert not torch.equal(first, dict(renamed)[other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_keeps_the_dtype(dtype: torch.dtype) -> None:
    own = tensors(dtype)
    received = sent(own)[ROUTER]
    assert received.dtype == dtype
    assert (received - own[ROUTER]).double().square().mean().sqrt() == pytest.approx(0.06, rel=0.05)


def test_a_familys_table_names_the_routers_of_the_layers_that_have_one() -> None:
    family = FAMILIES["Qwen3MoeForCausalLM"]
    shape = family.shape({**MOE, "mlp_only_layers": [0]})
    assert family.router_names(shape) == {f"model.layers.{i}.mlp.gate.weight" for i in range(1, shape.num_layers)}


def test_the_engines_dtype_is_what_is_sent() -> None:
    own = tensors()
    received = dict(in_dtype(iter(own.items()), torch.bfloat16))
    assert {tensor.dtype for tensor in received.values()} == {torch.bfloat16}
    assert torch.equal(received[EXPERT], own[EXPERT].bfloat16())


def test_expert_biases_keep_their_dtype_on_the_way_to_an_engine_of_another() -> None:
    sigmoid = {"n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
    family = FAMILIES["Glm4MoeForCausalLM"]
    shape = family.shape(MOE | sigmoid | {"architectures": ["Glm4MoeForCausalLM"], "norm_topk_prob": True})
    bias = "model.layers.{}.mlp.gate.e_score_correction_bias".format
    assert family.bias_names(shape) == {bias(1), bias(2)}
    own = tensors() | {bias(1): torch.tensor([1.0, 1.0 + 2**-20])}
    received = dict(in_dtype(iter(own.items()), torch.bfloat16, family.bias_names(shape)))
    assert received[EXPERT].dtype == torch.bfloat16
    assert received[bias(1)].dtype == torch.float32 and torch.equal(received[bias(1)], own[bias(1)])
