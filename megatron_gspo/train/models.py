"""Whether the models of a run fit together: policy, reference and what servers hold; from ``config.json`` alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.algorithm.importance import rule_named
from megatron_gspo.config import Placement, RolloutConfig, RunConfig
from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.errors import ConfigError, UserError
from megatron_gspo.hf.catalog import read_config, read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.directory import check_companions
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import check_layout, check_positions
from megatron_gspo.hf.lora import lora_targets
from megatron_gspo.hf.names import holds_weights
from megatron_gspo.hf.peft import check_adapters
from megatron_gspo.megatron.checkpoint_files import is_distributed
from megatron_gspo.platforms import CUDA, here
from megatron_gspo.rollout.engine import ENGINES
from megatron_gspo.rollout.sglang.probe import probe, quantization_of
from megatron_gspo.train.engine_dtype import check_eight_bits, check_form
from megatron_gspo.train.passes import find_pass
from megatron_gspo.train.turns import ASLEEP, TURNING

TOLD_APART_BY = ("architectures", "vocab_size", "num_hidden_layers", "hidden_size", "num_experts")
"""Of config.json: a model of others takes none of the policy's weights, or keeps some of its own."""
TIMEOUT_S = 10.0
"""Of a question to a server."""


def check_own_code(config: RunConfig) -> None:
    """Raises ConfigError for a rule or a pass that cannot be had, before anything is started."""
    if config.correction.rule != "off":
        rule_named(config.correction.rule)
    for name in config.algorithm.passes:
        find_pass(name)


def check_models(config: RunConfig) -> None:
    """Raises ConfigError, naming the setting, for a policy of too few positions, of layers that the engine does not
    have or sizes that it does not take, noise on the routers of a model that has none, and a reference that cannot be
    one."""
    check_own_code(config)
    family, shape = read_model(config.model.path)
    check_companions(Path(config.model.path))
    check_positions(config.rollout, shape)
    if config.algorithm.draws_responses:
        check_engine(config.rollout.engine, config.model.path, shape)
        check_eight_bits(config.rollout, config.model.path, family, shape, config.placement.sizes(config.rollout))
    if config.sync.router_noise and not family.router_names(shape):
        raise ConfigError(
            f"sync.router_noise = {config.sync.router_noise:g}, but {config.model.path} has no router: set it to 0"
        )
    check_lora(config, family, shape)
    path = config.algorithm.reference
    if not (path and config.algorithm.uses_reference):
        return
    try:
        _, other = read_model(path)
        if not is_distributed(Path(path)):
            HfReader(path)
        check_layout(config.parallel, other)
    except UserError as error:
        raise ConfigError(f"algorithm.reference: {error}") from None
    if other.vocab_size != shape.vocab_size:
        raise ConfigError(
            f"algorithm.reference = {path} has a vocabulary of {other.vocab_size}, model.path one of "
            f"{shape.vocab_size}: the reference must be a model of the same tokenizer"
        )


def check_lora(config: RunConfig, family: Family, shape: ModelShape) -> None:
    """Raises ConfigError for targets that the model does not have, and for adapters to start from that are others."""
    lora_targets(family, shape, config.lora)
    if config.lora.path:
        check_adapters(Path(config.lora.path), family, shape, config.lora)


def check_engine(engine: str, path: str | Path, shape: ModelShape) -> None:
    """Raises ConfigError for a model, that at ``path``, which the engine takes for another one, or cannot hold."""
    given = read_config(path)
    for key, computed in ENGINES[engine].computed_with.get(shape.architecture, {}).items():
        if given.get(key, computed) != computed:
            raise ConfigError(
                f"{path}: {key} = {json.dumps(given[key])} in config.json, and {engine} computes a "
                f"{shape.architecture} with {json.dumps(computed)} whatever it says: its responses would come from "
                f"another model"
            )
    size = shape.hidden_size // shape.num_attention_heads
    if shape.head_dim != size and shape.architecture in ENGINES[engine].sizes_heads:
        raise ConfigError(
            f"{path}: head_dim = {shape.head_dim} in config.json, and {engine} gives a {shape.architecture} heads of "
            f"hidden_size / num_attention_heads = {size}, whatever it says: it cannot hold these weights"
        )
    dense = [layer for layer, moe in enumerate(shape.moe_layers) if not moe]
    if dense and shape.architecture in ENGINES[engine].without_dense_layers:
        raise ConfigError(
            f"{path} has dense layers ({', '.join(map(str, dense[:8]))}; mlp_only_layers and decoder_sparse_step in "
            f"config.json), and {engine} makes every layer of a {shape.architecture} a mixture of experts: its "
            f"responses would come from another model"
        )


def engine_holds_head(engine: str, shape: ModelShape) -> bool:
    """Whether the engine has a head of its own where the model ties it to the embedding: a sync must send it."""
    return shape.tied_embeddings and shape.architecture in ENGINES[engine].own_heads


def unread(engine: str, path: str | Path, shape: ModelShape) -> str:
    """What of the weights at ``path`` the engine does not read by itself, "" for nothing; a sync sends it."""
    if engine_holds_head(engine, shape):
        return f"its head is tied to the embedding, and {engine} gives a {shape.architecture} one of its own"
    return _not_loaded(Path(path))


def placed_here(config: RunConfig, *, ranks: int, cores: int | None = None) -> Placement:
    """Where ``ranks`` trainer ranks of this machine and servers lie, on CPUs so many as ``cores`` (this machine's) are
    for. Raises ConfigError."""
    cards = torch.cuda.device_count() if here() is CUDA else 0
    return config.placed(ranks=ranks, cards=cards, cores=len(os.sched_getaffinity(0)) if cores is None else cores)


def served(config: RunConfig, placement: Placement, path: str | Path = "") -> RolloutConfig:
    """``rollout`` for the local servers of ``placement`` on ``path``, ``model.path`` unless given. Where the engine
    cannot load what is there, or wants it in eight bits, they start with whatever is in memory, and the first push
    fills it."""
    update: dict[str, Any] = {"local_servers": len(placement.first_cards)}
    if config.rollout.engine_dtype == EIGHT_BITS or _not_loaded(Path(path or config.model.path)):
        update["server_args"] = ("--load-format", "dummy", *config.rollout.server_args)
    return config.rollout.model_copy(update=update)


def _not_loaded(path: Path) -> str:
    if is_distributed(path):
        return "it is a Megatron checkpoint"
    if holds_weights(path) and (stacked := HfReader(path).stacked()):
        return f"its experts are stacked ({stacked[0]}, ...)"
    return ""


def check_served(urls: Sequence[str], model: str, key: str = "", dtype: str = "", *, awake: bool = True) -> None:
    """Raises ConfigError for a server that was started from another model than ``model``, or for weights in another
    form than ``dtype``, the ``rollout.engine_dtype``; and, unless it may be, for one that a run with
    ``placement.mode = "colocated"`` has left asleep.

    Weight sync would not notice one of more layers. Asked are servers whose directory can be read from here.
    """
    own = read_config(model)
    for state in probe(urls, TIMEOUT_S, key, health=False):  # they may be asleep
        if state.started_from is None:
            continue  # that it does not answer is said when it is asked for responses
        if awake and str(state.weight_version).endswith((ASLEEP, TURNING)):
            raise ConfigError(
                f"rollout.servers: {state.url} was left asleep (weight version {state.weight_version}) by a run that "
                f'took turns with it: start it again, or set placement.mode = "colocated"'
            )
        served = Path(state.started_from)
        theirs = read_config(served) if (served / "config.json").is_file() else {}
        if difference := first_difference(own, theirs):
            raise ConfigError(f"rollout.servers: {state.url} holds another model ({served}): its {difference}")
        check_form(dtype, state.url, theirs, quantization_of(state.url, TIMEOUT_S, key))


def first_difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first setting that tells two ``config.json`` apart, with both values; empty when none does."""
    for key in TOLD_APART_BY:
        if key in own and key in other and own[key] != other[key]:
            return f"{key} = {other[key]}, model.path has {own[key]}"
    return ""
