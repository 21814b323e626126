"""How ``config.json`` reads: what every family's says in the same words, and what no family here does.

A key that is absent means what it means to transformers. Each family lists those that it may leave out, with
transformers' own defaults (``Family.defaults``); a size of the model has to be there.
"""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.quantisation import refuse_quantised
from megatron_gspo.hf.rotary import Llama3Rope, ScaledRope, YarnRope

ROTARY_BASE = 10000.0
"""transformers' own, where a family has no other."""
Config = dict[str, Any]


def dense_shape(config: Config, **further: Any) -> ModelShape:
    """What every family's ``config.json`` says in the same words, as a dense model; ``further`` are fields beside it.

    The family's defaults are in ``config``. Raises ConfigError for what no family here does.
    """
    refuse_everywhere(config)
    if "rotary_fraction" not in further:
        fraction = rope_value(config, "partial_rotary_factor", None)
        if fraction not in (None, 1):  # SGLang turns a part of each head, transformers all of it, and nobody says so
            raise ConfigError(f"partial_rotary_factor = {fraction!r:.80} in config.json is not supported: only 1")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    fields = {
        "architecture": config["architectures"][0],
        "num_layers": layers,
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"] or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "num_experts": 0,
        "top_k": 0,
        "expert_hidden_size": 0,
        "moe_layers": (False,) * layers,
        "rotary_base": rotary_base(config),
        "norm_epsilon": config["rms_norm_eps"],
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "max_positions": config["max_position_embeddings"],
        "megatron": {},
    }
    return ModelShape(**{**fields, **further})


def renamed(config: Config, **names: str) -> Config:
    """``config`` with keys under the names that a family reads: ``renamed(config, old="new")``.

    transformers takes both, and writes now one and now the other. Raises ConfigError where they disagree.
    """
    for old, new in names.items():
        value = config.get(old)
        if value is None:
            continue
        if config.get(new) not in (None, value):
            raise ConfigError(
                f"{new} = {config[new]!r:.80} and {old} = {value!r:.80} in config.json: they name one thing; remove one"
            )
        config = config | {new: value}
    return config


# ------------------------------------------------------------------------------------------------------ rotary angles


def rope(config: Config) -> Config:
    """Rotary settings: transformers 5's ``rope_parameters``, or the older ``rope_scaling``.

    Raises ConfigError where both are given and differ, and for settings of several kinds of layer.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and new != old:
        raise ConfigError(
            f"rope_parameters = {json.dumps(new)} and rope_scaling = {json.dumps(old)} in config.json differ: remove "
            f"the one that is wrong"
        )
    found: Config = new or old
    if not isinstance(found, dict):
        raise ConfigError(f"rotary settings of config.json are {json.dumps(found)[:80]}, not an object of settings")
    nested = [name for name, value in found.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"rope_parameters with {nested[0]!r:.80} in config.json: one for all layers is supported")
    return found


def rope_value(config: Config, name: str, default: Any) -> Any:
    """A rotary setting, which may stand within ``rope_parameters`` or beside it. Raises ConfigError if it differs."""
    within = rope(config)
    if name in within and config.get(name) not in (None, within[name]):
        raise ConfigError(
            f"{name} = {config[name]!r:.80} in config.json, and {within[name]!r:.80} in its rope_parameters: remove "
            f"the one that is wrong"
        )
    return within.get(name, config.get(name, default))


def rope_type(config: Config) -> str:
    """ "default", "yarn", ..."""
    return str(rope(config).get("rope_type", rope(config).get("type", "default")))


def rotary_base(config: Config, default: float = ROTARY_BASE) -> float:
    """The rotary base, from transformers 5's ``rope_parameters`` or the older ``rope_theta``."""
    base = rope_value(config, "rope_theta", default)
    if isinstance(base, bool | str):
        raise ConfigError(f"rope_theta = {json.dumps(base)[:80]} in config.json is not a number")
    return float(base)


def refuse_scaled_rope(config: Config) -> None:
    """Raises ConfigError for rotary angles other than the default ones."""
    if rope_type(config) != "default":
        raise ConfigError(f'rope_type = "{rope_type(config)}" in config.json is not supported: only "default"')


def scaled_rope(config: Config) -> ScaledRope | None:
    """How rotary frequencies are scaled: "llama3", "yarn", or not at all.

    Raises ConfigError for another kind, for what is missing of one, and for numbers that make no angle.
    """
    kind, settings = rope_type(config), rope(config)
    if kind == "default":
        return None
    if kind == "llama3":
        low, high = (_positive(settings, f"{name}_freq_factor") for name in ("low", "high"))
        if low >= high:
            raise ConfigError(f"low_freq_factor = {low:g} in config.json must be below high_freq_factor = {high:g}")
        return Llama3Rope(_positive(settings, "factor", least=1), low, high, original_positions(config))
    if kind == "yarn":
        return _yarn(config, settings)
    raise ConfigError(f'rope_type = "{kind}" in config.json is not supported: "default", "llama3" or "yarn"')


def _yarn(config: Config, settings: Config) -> YarnRope:
    """transformers reads ``attention_factor``, SGLang ``attn_factor``: stated, they would differ."""
    for name in ("attention_factor", "attn_factor"):
        if settings.get(name) is not None:
            raise ConfigError(
                f"{name} = {settings[name]!r:.80} in config.json's rotary settings is not supported: remove it, which "
                f"means 0.1 ln(factor) + 1"
            )
    factor = _positive(settings, "factor", least=1)
    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    scales = (float(mscale), float(all_dim)) if mscale and all_dim else (1.0, 0.0)
    fast, slow = (_positive({name: settings.get(name) or default}, name) for name, default in _TURNS.items())
    if fast <= slow:
        raise ConfigError(f"beta_fast = {fast:g} in config.json must be above beta_slow = {slow:g}")
    whole = settings.get("truncate") is not False
    return YarnRope(factor, fast, slow, original_positions(config), *scales, whole)


_TURNS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _positive(settings: Config, name: str, least: float = 0.0) -> float:
    value = settings.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not max(least, 1e-9) <= value < math.inf:
        wanted = f"a number of at least {least:g}" if least else "a positive number"
        raise ConfigError(f"{name} = {json.dumps(value)[:80]} in config.json's rotary settings is not {wanted}")
    return float(value)


def original_positions(config: Config) -> int:
    """Positions that the model had before they were stretched; where nothing says so, those that it has now."""
    name = "original_max_position_embeddings"
    value = rope_value(config, name, config["max_position_embeddings"])
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} = {json.dumps(value)[:80]} in config.json is not a number of positions")
    return value


# ------------------------------------------------------------------------------------------------------------ refusals


def refuse_everywhere(config: Config) -> None:
    """Raises ConfigError for what a ``config.json`` may ask and no family here does."""
    refuse(config, "use_sliding_window", "clip_qkv", "router_jitter_noise")
    refuse_quantised(config)
    refuse_other(config, "hidden_act", "silu")
    kinds = config.get("layer_types") or ()
    other = [kind for kind in kinds if kind != "full_attention"]
    if other:
        raise ConfigError(f"layer_types with {other[0]!r:.80} in config.json is not supported: only full_attention")


def refuse(config: Config, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is anything but false, 0, null or absent."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"{name} = {json.dumps(config[name])} in config.json is not supported")


def refuse_other(config: Config, name: str, only: Any) -> None:
    """Raises ConfigError for a setting that is there and not ``only``."""
    if config.get(name, only) != only:
        raise ConfigError(
            f"{name} = {json.dumps(config[name])} in config.json is not supported: only {json.dumps(only)}"
        )


# ----------------------------------------------------------------------------------------------------- layers, routers


def sparse_layers(config: Config) -> tuple[bool, ...]:
    """Which layers Qwen's ``decoder_sparse_step`` and ``mlp_only_layers`` make mixtures of experts."""
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(config["num_hidden_layers"])
    if not all(type(layer) is int and layer in layers for layer in dense):
        raise ConfigError(f"mlp_only_layers = {sorted(map(str, dense))} in config.json are not layers of {len(layers)}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def layers_after(config: Config) -> tuple[bool, ...]:
    """Which layers are mixtures of experts where the first ``first_k_dense_replace`` are dense."""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    if type(dense) is not int or dense < 0:
        raise ConfigError(f"first_k_dense_replace = {dense!r:.80} in config.json is not a number of layers")
    return tuple(layer >= dense for layer in range(layers))


def predicting_layers(config: Config) -> int:
    """Multi-token-prediction layers that a checkpoint stores behind its last layer."""
    count = config["num_nextn_predict_layers"] or 0
    if type(count) is not int or not 0 <= count < 100:
        raise ConfigError(f"num_nextn_predict_layers = {count!r:.80} in config.json is not a number of layers")
    return count


def softmax_router(normalised: bool) -> dict[str, Any]:
    """Megatron's settings for softmax scores.

    Dividing the chosen experts' probabilities by their sum is a softmax over the chosen logits; without it the
    probabilities of the softmax over all experts are used as they are (pre-softmax).
    """
    return {"moe_router_pre_softmax": not normalised, "moe_router_score_function": "softmax"}


def sigmoid_router(config: Config) -> dict[str, Any]:
    """Megatron's settings for DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16).

    Experts are chosen by sigmoid(logit) + bias, within the best groups of them; their weights are the sigmoids alone,
    divided by their sum and scaled. The bias is no parameter: it is loaded, kept as it is, and sent on.

    Raises ConfigError where Megatron's router differs: it normalises whenever it chooses several, and scores a group
    by its best top_k / topk_group experts, where Hugging Face takes two; and for another router than this one, which
    only code beside the weights would make.
    """
    refuse_other(config, "scoring_func", "sigmoid")
    refuse_other(config, "topk_method", "noaux_tc")
    refuse_other(config, "moe_layer_freq", 1)
    top_k, normalised = config["num_experts_per_tok"], config["norm_topk_prob"]
    if normalised != (top_k > 1):
        raise ConfigError(
            f"norm_topk_prob = {json.dumps(normalised)} with num_experts_per_tok = {top_k} in config.json is not "
            f"supported: Megatron's sigmoid router normalises the weights of several experts, and of one does not"
        )
    groups, chosen = config["n_group"] or 1, config["topk_group"] or 1
    limited = chosen < groups
    if limited and (top_k // chosen != 2 or config["n_routed_experts"] % groups):
        raise ConfigError(
            f"n_group = {groups}, topk_group = {chosen}, num_experts_per_tok = {top_k}, n_routed_experts = "
            f"{config['n_routed_experts']} in config.json are not supported: Megatron scores a group by its best "
            f"num_experts_per_tok // topk_group experts, which must be two, and groups must be of one size"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": chosen if limited else None,
        "moe_router_topk_scaling_factor": float(config["routed_scaling_factor"]),
    }
