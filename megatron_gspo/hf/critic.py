"""A family's model with a value head: what transformers calls its ``ForTokenClassification`` with one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_gspo.hf.catalog import read_config, read_model
from megatron_gspo.hf.directory import write_json
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.parts import Shapes
from megatron_gspo.hf.weights import WeightRule

POLICY, CRITIC = "ForCausalLM", "ForTokenClassification"
"""How the names of the two classes end."""
HEAD = "output_layer."
VALUE_RULES = (
    WeightRule("output_layer.weight", ("score.weight",), "whole", starts_at_zero=True),
    WeightRule("output_layer.bias", ("score.bias",), "whole", starts_at_zero=True),
)


def read_critic(directory: str | Path, *, dequantised: bool = False) -> tuple[Family, ModelShape]:
    """The family and shape of a critic that starts from ``directory``, which holds a policy or a critic.

    ``dequantised``, and what it raises: as of ``read_model``.
    """
    family, shape = read_model(directory, dequantised=dequantised, renamed={CRITIC: POLICY})
    return critic_of(family), shape


def name_as_critic(directory: Path) -> None:
    """Makes the ``config.json`` of a policy that of its critic, in place."""
    path = directory / "config.json"
    config = read_config(directory)
    names = [str(name).removesuffix(POLICY).removesuffix(CRITIC) + CRITIC for name in config["architectures"]]
    config |= {"architectures": names, "id2label": {"0": "value"}, "label2id": {"value": 0}}
    write_json(path, config)


def in_reward_units(name: str, tensor: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """A tensor of a critic that was trained on (returns - mean) / std, as one that gives values in the rewards' units
    has it: its value head's are others."""
    if name.startswith("score."):
        tensor = (tensor.double() * std).to(tensor.dtype)
    return tensor + mean if name == "score.bias" else tensor


def critic_of(family: Family) -> Family:
    """The family with a value head in the place of that over the vocabulary."""

    def rules(model: ModelShape) -> Sequence[WeightRule]:
        return (*(rule for rule in family.rules(model) if not rule.megatron.startswith(HEAD)), *VALUE_RULES)

    def tensor_shapes(model: ModelShape) -> Mapping[str, tuple[int, ...]]:
        stored: Shapes = {n: size for n, size in family.tensor_shapes(model).items() if n != "lm_head.weight"}
        return stored | {"score.weight": (1, model.hidden_size), "score.bias": (1,)}

    return replace(
        family,
        architecture=family.architecture.replace(POLICY, CRITIC),
        rules=rules,
        tensor_shapes=tensor_shapes,
    )
