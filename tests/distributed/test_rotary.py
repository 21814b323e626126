"""Rotary embeddings of a half type: the angles, products and sums of float32, and one rounding at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gspo.megatron.groups import start_distributed
from tests.pool import RankPool

pytestmark = pytest.mark.distributed
LENGTHS, HEADS, WIDTH = (700, 300), 2, 32
HALF_ULP = 2.0**-8
"""Of bfloat16, relative to the smallest number that has it."""


def angles() -> torch.Tensor:
    """[longest, 1, 1, d] float32, as Megatron makes them."""
    inverse = 1e4 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float32) / WIDTH)
    half = torch.outer(torch.arange(max(LENGTHS) + 1, dtype=torch.float32), inverse)
    return torch.cat([half, half], dim=-1)[:, None, None]


def turned(t_THd: torch.Tensor, latent: bool, direction: float = 1.0) -> torch.Tensor:
    """The rotation in float64, pair by pair; ``latent`` pairs neighbours and lays their turned halves end to end."""
    angle = torch.cat([angles()[:length, 0, 0, : WIDTH // 2] for length in LENGTHS]).double()[:, None] * direction
    t = t_THd.double()
    first, second = (t[..., 0::2], t[..., 1::2]) if latent else t.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def by_megatron(rotate: Callable[..., torch.Tensor], latent: bool, t: torch.Tensor) -> torch.Tensor:
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=latent, mrope_section=None
    )
    asked = "mla_rotary_interleaved" in inspect.signature(rotate).parameters  # of 0.19.2, where 0.16.1 reads the config
    more: dict[str, Any] = {"mla_rotary_interleaved": latent} if asked else {}
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return rotate(t, angles(), config=config, cu_seqlens=boundaries, cp_group=dist.group.WORLD, **more)


def errors(latent: bool) -> dict[str, float]:
    """Relative errors of a bfloat16 query and of its gradient, in units of bfloat16's half ulp; the largest of each,
    and the root mean square of Megatron's own."""
    start_distributed()
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention, multi_latent_attention

    rotate = rope_utils.apply_rotary_pos_emb
    assert attention.apply_rotary_pos_emb is multi_latent_attention.apply_rotary_pos_emb is rotate
    generator = torch.Generator().manual_seed(0)
    t, gradient = torch.randn(2, sum(LENGTHS), HEADS, WIDTH, generator=generator).bfloat16()
    query = t.clone().requires_grad_()
    out = by_megatron(rotate, latent, query)
    out.backward(gradient)
    assert out.dtype == query.grad.dtype == torch.bfloat16
    exact = turned(t, latent)
    float64 = by_megatron(rotate, latent, t.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", rope_utils._apply_rotary_pos_emb_bshd.__wrapped__)
        plain = by_megatron(rotate, latent, t)
    rms, plain_rms = (relative(each, exact).square().mean().sqrt() for each in (out, plain))
    found = {
        "rms": rms,
        "plain": plain_rms,
        "query": relative(out, exact).max(),
        "float64": (float64 - exact).abs().max() / HALF_ULP,
    }
    if not latent:  # whose pairs lie elsewhere in the gradient
        found["gradient"] = relative(query.grad, turned(gradient, latent, -1.0)).max()
    return {name: float(value) for name, value in found.items()}


def relative(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (found.double() - exact).abs() / (HALF_ULP * exact.abs() + 1e-6)


@pytest.mark.parametrize("latent", [False, True])
def test_a_bfloat16_rotation_is_float64s_rounded_once(ranks: RankPool, latent: bool) -> None:
    (found,) = ranks.run(1, errors, latent)
    assert 0.9 < found["query"] < 1.01 and found.get("gradient", 1.0) < 1.01
    assert found["plain"] > 2 * found["rms"], "what Megatron's own roundings are"
    assert found["float64"] < 1e-3, "angles are float32's, and nothing else is rounded"
