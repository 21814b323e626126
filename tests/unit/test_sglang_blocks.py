"""Products with matrices of eight bits that servers compute on a CPU, against sums written down separately."""

from __future__ import annotations

import torch

from megatron_gspo.hf.fp8 import dequantise, quantise
from megatron_gspo.rollout.sglang.blocks import experts, product, rounded, widen


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_are_what_convert_reads() -> None:
    stored = quantise("w", random(200, 256))
    assert torch.equal(widen(*stored).bfloat16(), dequantise("w", *stored))


def test_activations_have_a_scale_for_each_token_and_group_of_128() -> None:
    x = random(3, 256)
    x[1, 128:] *= 1000
    for token in range(3):
        for start in (0, 128):
            group = x[token, start : start + 128]
            scale = group.abs().max() / 448
            expected = (group / scale).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(rounded(x)[token, start : start + 128], expected)
    assert not rounded(torch.zeros(1, 128)).any()


def test_a_product_is_that_of_the_rounded_factors() -> None:
    x, stored = random(5, 256).bfloat16(), quantise("w", random(144, 256, seed=1))
    exact = rounded(x).double() @ widen(*stored).double().T
    out = product(x, *stored)
    assert out.dtype == torch.bfloat16 and out.shape == (5, 144)
    assert torch.allclose(out.double(), exact, rtol=2**-8, atol=1e-4)


def test_experts_are_the_chosen_ones_under_their_weights() -> None:
    x, width, count = random(7, 128), 128, 4
    up = [quantise("w", random(2 * width, 128, seed=expert)) for expert in range(count)]
    down = [quantise("w", random(128, width, seed=10 + expert)) for expert in range(count)]
    chosen = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(t))[:2] for t in range(7)])
    weights = random(7, 2).abs()
    expected = torch.zeros(7, 128)
    for token in range(7):
        for slot in range(2):
            expert = int(chosen[token, slot])
            gate, value = product(x[token : token + 1], *up[expert]).split(width, -1)
            hidden = torch.nn.functional.silu(gate) * value
            expected[token] += weights[token, slot] * product(hidden, *down[expert])[0]
    stacked = [(torch.stack([w for w, _ in pair]), torch.stack([s for _, s in pair])) for pair in (up, down)]
    found = experts(x, *stacked, weights, chosen)
    assert (found - expected).norm() < 1e-3 * expected.norm(), "but for sums that round to another eighth bit"
