"""Whether a local server's size divides the model, and its cards hold the weights. (Not run on a GPU yet.)"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.config import Placement
from megatron_gspo.config.servers import ServerSizes
from megatron_gspo.errors import ConfigError
from megatron_gspo.rollout.sglang.purpose import ROLLOUTS, Purpose
from megatron_gspo.untrusted import open_regular, read_json

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
EIGHT_BIT_CARD = (8, 9)
EXPECTED = "expected_weights.json"
"""In a directory without weights: {"bytes": of those that a sync will bring}."""
FP8_KERNELS = {"--fp8-gemm-backend": "triton", "--moe-runner-backend": "triton"}
"""Take weights and scales as a sync brings them, on every card. Others make them anew as they load: DeepGEMM, which is
the default on Blackwell, rounds scales to powers of two and packs them, and does not at a second sync."""


def check_divides(sizes: ServerSizes, config: Mapping[str, Any], purpose: Purpose = ROLLOUTS) -> None:
    """Raises ConfigError for sizes that do not divide the model of a ``config.json``: SGLang takes such a command line,
    and fails when it makes the layers, or answers nonsense."""
    wrong = list(_misfits(sizes, config.get("text_config") or config))
    if wrong:
        raise ConfigError(f"the size of a local server ({purpose.sizes}): {'; '.join(wrong)}")


def _misfits(sizes: ServerSizes, config: Mapping[str, Any]) -> list[str]:
    tensor, experts = sizes.tensor, _experts(config)
    wrong = []
    for flag, part in (("--attn-dp-size", sizes.attention_data), ("--ep-size", sizes.expert)):
        if tensor % part:
            wrong.append(f"{flag} {part} does not divide --tp-size {tensor}")
    attention = max(1, tensor // sizes.attention_data)
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and heads % attention:
        wrong.append(f"{attention} tensor ranks do not divide {heads} attention heads")
    groups = config.get("num_key_value_heads")
    if isinstance(groups, int) and groups > 0 and groups % attention and attention % groups:
        wrong.append(f"{attention} tensor ranks neither divide nor are a multiple of {groups} key-value heads")
    if experts and experts % sizes.expert:
        wrong.append(f"--ep-size {sizes.expert} does not divide {experts} experts")
    width, parts = config.get("moe_intermediate_size") or config.get("intermediate_size"), tensor
    if experts:
        parts = max(1, tensor // sizes.expert)
    if isinstance(width, int) and width % parts:
        wrong.append(f"{parts} tensor ranks do not divide the feed-forward width {width}")
    return wrong


def _experts(config: Mapping[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def check_fits(placement: Placement, weights: int | None, card: int, purpose: Purpose = ROLLOUTS) -> None:
    """Raises ConfigError when a server's share of a card does not hold its part of the weights.

    ``weights``: bytes in the engine's dtype, None where nobody knows. ``card``: bytes of the smallest card.
    """
    if weights is None:
        return
    share, parts = placement.share, placement.sizes.tensor * placement.sizes.pipeline
    if weights / parts < share * card:
        return
    raise ConfigError(
        f"a {purpose.noun}: {weights / GIB:.1f} GiB of weights over {parts} card(s) are {weights / parts / GIB:.1f} "
        f"GiB each, and a local server has {share:g} of {card / GIB:.1f} GiB = {share * card / GIB:.1f} GiB for them "
        f"and its cache: {purpose.more_room}"
    )


def check_cards(dtype: str) -> None:
    """Raises ConfigError for eight bits on GPUs that do not multiply them: SGLang packs the weights for another kernel
    as it loads them, and those of a sync would be read as if they were packed."""
    if dtype != "fp8":
        return
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    older = [f"{major}.{minor}" for major, minor in found if (major, minor) < EIGHT_BIT_CARD]
    if older:
        raise ConfigError(
            f'rollout.engine_dtype = "fp8" needs cards of compute capability {EIGHT_BIT_CARD[0]}.{EIGHT_BIT_CARD[1]} '
            f'(Ada, Hopper or later), and one here has {older[0]}: use "bfloat16"'
        )


def weight_bytes(model: Path, dtype: str) -> int | None:
    """Bytes of a Hugging Face directory's weights in ``dtype``, from the headers of its files or, where a sync brings
    them all, what ``EXPECTED`` says; None where there are no files, they are quantised, or are not readable (the server
    says so itself)."""
    try:
        if (model / EXPECTED).is_file():
            return int(read_json(model / EXPECTED)["bytes"])
        numbers = [_numbers(path) for path in sorted(model.glob("*.safetensors"))]
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return sum(numbers) * ITEM_BYTES.get(dtype, 4) if numbers else None


def _numbers(path: Path) -> int:
    """Elements of a file's tensors."""
    with open_regular(path) as file:
        header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 2**28)))
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    if any(entry["dtype"].startswith(("F8", "F4", "U8", "I8")) for entry in entries):
        raise ValueError("quantised weights take other room than their numbers say")
    shapes = [entry["shape"] for entry in entries]
    return sum(torch.Size(shape).numel() for shape in shapes)


def check_placement(
    placement: Placement, model: Path, dtype: str, cards: Sequence[int], purpose: Purpose = ROLLOUTS
) -> None:
    """Raises ConfigError for servers whose sizes do not divide the model at ``model``, or whose share of a card (of
    ``cards``, bytes of each; none on a CPU) does not hold its weights in ``dtype``."""
    try:
        config = read_json(model / "config.json")
    except (OSError, ValueError):  # the server says so
        config = None
    if isinstance(config, dict):
        check_divides(placement.sizes, config, purpose)
    if cards:
        check_fits(placement, weight_bytes(model, dtype), min(cards), purpose)


def cards_here() -> list[int]:
    """Bytes of each GPU that this process sees."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
