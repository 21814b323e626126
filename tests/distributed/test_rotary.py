"""Rotary embeddings of a half type: the angles, products and sums of float32, and one rounding at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gspo.megatron.attention import positions
from megatron_gspo.megatron.groups import start_distributed
from megatron_gspo.megatron.rotary import Rotation
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
    boundaries: Any = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    boundaries.rotation = Rotation(positions(boundaries, 1, 0))
    return rotate(t, angles(), config=config, cu_seqlens=boundaries, cp_group=dist.group.WORLD, **more)


def megatrons_own(t: torch.Tensor, latent: bool) -> torch.Tensor:
    """What stands in Megatron for a query whose positions are those of ``LENGTHS``."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

    newer = "mla_rotary_interleaved" in inspect.signature(rotate).parameters
    named = "mla_rotary_interleaved" if newer else "multi_latent_attention"
    own = torch.cat([angles()[:length] for length in LENGTHS])
    return rotate(t[:, None], own, **{named: latent})[:, 0]


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
    plain = megatrons_own(t, latent)
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


def same_bits(latent: bool) -> list[bool]:
    """Whether a float32 query and its gradient are Megatron's own."""
    start_distributed()
    from megatron.core.models.common.embeddings import rope_utils

    def both(by: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        query = drawn[0].clone().requires_grad_()
        out = by(query)
        out.backward(drawn[1])
        assert query.grad is not None
        return out.detach(), query.grad

    drawn = torch.randn(2, sum(LENGTHS), HEADS, WIDTH + 8, generator=torch.Generator().manual_seed(0))
    ours = both(lambda query: by_megatron(rope_utils.apply_rotary_pos_emb, latent, query))
    return [torch.equal(*each) for each in zip(ours, both(lambda query: megatrons_own(query, latent)), strict=True)]


@pytest.mark.parametrize("latent", [False, True])
def test_a_float32_rotation_and_its_gradient_are_megatrons_bit_for_bit(ranks: RankPool, latent: bool) -> None:
    assert ranks.run(1, same_bits, latent) == [[True, True]]


def test_context_ranks_turn_by_the_positions_that_megatron_gives_them() -> None:
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    boundaries = torch.tensor([0, 8, 32, 36], dtype=torch.int32)
    numbers = torch.arange(24)
    for rank in range(2):
        own = [
            _get_thd_freqs_on_this_cp_rank(rank, 2, numbers[: length // 2], numbers)
            for length in boundaries.diff().tolist()
        ]
        assert positions(boundaries, 2, rank).tolist() == torch.cat(own).tolist()
