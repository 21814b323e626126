"""How many cards a local server takes, and whether they and the model's sizes allow it. (Not run on a GPU yet.)"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.untrusted import open_regular, read_json

GPU_SHARE = 0.4
"""Of a GPU's memory that a local server takes; the trainer has the rest."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
SIZES = {
    "tensor": ("--tp-size", "--tensor-parallel-size", "--tp"),
    "pipeline": ("--pp-size", "--pipeline-parallel-size", "--pp"),
    "data": ("--dp-size", "--data-parallel-size", "--dp"),
    "attention_data": ("--attn-dp-size", "--attention-data-parallel-size"),
    "expert": ("--ep-size", "--expert-parallel-size", "--ep"),
    "step": ("--gpu-id-step",),
}


@dataclass(frozen=True)
class ServerSizes:
    """What ``rollout.server_args`` say of a server's ranks.

    >>> server_sizes(["--tp-size", "4", "--attn-dp-size=2"]).cards
    4
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    attention_data: int = 1
    """Of the tensor ranks, groups that each attend to other requests."""
    expert: int = 1
    step: int = 1
    """Distance of the cards of neighbouring ranks."""
    base: int | None = None
    """Its first card, where the user names it."""
    share: float | None = None
    """Of each card's memory, for weights and cache, where the user names it."""

    @property
    def cards(self) -> int:
        """GPUs from its first to its last rank."""
        return (self.tensor * self.pipeline * self.data - 1) * self.step + 1


def server_sizes(server_args: Sequence[str]) -> ServerSizes:
    """Reads a command line as SGLang 0.5.23 does. Raises ConfigError for what is no size, and for a flag that it has
    deprecated."""
    if "--enable-dp-attention" in server_args:
        raise ConfigError(
            "rollout.server_args: SGLang has deprecated --enable-dp-attention; --attn-dp-size N says it alone, and "
            "--dp-size N then starts N copies of the server"
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, flags in SIZES.items():
        parser.add_argument(*flags, dest=name, type=int, default=1)
    parser.add_argument("--base-gpu-id", dest="base", type=int)
    parser.add_argument("--mem-fraction-static", dest="share", type=float)
    try:
        sizes = ServerSizes(**vars(parser.parse_known_args(list(server_args))[0]))
    except argparse.ArgumentError as error:
        raise ConfigError(f"rollout.server_args: {error}") from None
    for name, flags in SIZES.items():
        if getattr(sizes, name) < 1:
            raise ConfigError(f"rollout.server_args: {flags[0]} {getattr(sizes, name)} is no number of ranks")
    return sizes


def base_gpus(sizes: ServerSizes, servers: int, cards: int) -> list[int]:
    """The first card of each server, one server's cards behind the other's.

    Raises ConfigError when there are not ``cards`` enough, or the user's --base-gpu-id puts several on the same ones.
    """
    if sizes.base is not None and servers > 1:
        raise ConfigError(
            f"rollout.server_args: --base-gpu-id {sizes.base} puts all {servers} local servers on the same cards: "
            f"leave it out, and each begins behind the one before"
        )
    first = sizes.base or 0
    last = first + servers * sizes.cards
    if last > cards:
        ranks = f"{servers} local server(s) of {sizes.cards} card(s) each"
        begin = f" from card {first} on" if first else ""
        raise ConfigError(
            f"rollout: {ranks}{begin} need {last} cards, and this machine shows {cards}: fewer rollout.local_servers, "
            f"or a smaller --tp-size in rollout.server_args"
        )
    return [first + index * sizes.cards for index in range(servers)]


def check_divides(sizes: ServerSizes, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for sizes that do not divide the model of a ``config.json``: SGLang takes such a command line,
    and fails when it makes the layers, or answers nonsense."""
    wrong = list(_misfits(sizes, config.get("text_config") or config))
    if wrong:
        raise ConfigError(f"rollout.server_args: {'; '.join(wrong)}")


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


def check_fits(sizes: ServerSizes, weights: int | None, card: int) -> None:
    """Raises ConfigError when a server's share of a card does not hold its part of the weights.

    ``weights``: bytes in the engine's dtype, None where nobody knows. ``card``: bytes of the smallest card.
    """
    if weights is None:
        return
    share = GPU_SHARE if sizes.share is None else sizes.share
    parts = sizes.tensor * sizes.pipeline
    if weights / parts < share * card:
        return
    raise ConfigError(
        f"rollout: {weights / GIB:.1f} GiB of weights over {parts} card(s) are {weights / parts / GIB:.1f} GiB each, "
        f"and a local server has {share:g} of {card / GIB:.1f} GiB = {share * card / GIB:.1f} GiB for them and its "
        f"cache: more cards a server (--tp-size), a larger --mem-fraction-static, or servers named in rollout.servers"
    )


def weight_bytes(model: Path, dtype: str) -> int | None:
    """Bytes of a Hugging Face directory's weights in ``dtype``, from the headers of its files; None where there are no
    files, they are quantised, or are not readable (the server says so itself)."""
    try:
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


def read_sizes(model: Path, server_args: Sequence[str]) -> ServerSizes:
    """``server_sizes``, which divide the model. Raises ConfigError."""
    sizes = server_sizes(server_args)
    try:
        config = read_json(model / "config.json")
    except (OSError, ValueError):  # the server says so
        return sizes
    if isinstance(config, dict):
        check_divides(sizes, config)
    return sizes


def place(sizes: ServerSizes, servers: int, weights: int | None, cards: Sequence[int]) -> list[int]:
    """The first card of each local server on a machine with ``cards`` (bytes of each). Raises ConfigError."""
    first = base_gpus(sizes, servers, len(cards))
    check_fits(sizes, weights, min(cards))
    return first


def cards_here() -> list[int]:
    """Bytes of each GPU that this process sees."""
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
