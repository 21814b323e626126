"""The critic: a model of its own that gives values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.algorithm.gae import ValueScale
from megatron_gspo.config import RunConfig
from megatron_gspo.hf.critic import in_reward_units, read_critic
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.heads import ValueHead
from megatron_gspo.megatron.network import Network
from megatron_gspo.types import PackedBatch


class Critic(Network):
    """V(state) by a model of the policy's family and layout; its objective takes (index, head's values [T_local]).

    Methods are collective, as those of ``Network``.
    """

    def __init__(self, config: RunConfig, groups: Groups, *, trainable: bool = True) -> None:
        """Builds it from ``critic.path`` (default ``model.path``), with the value head of that directory or of zeros.

        Raises ConfigError, LayoutError or WeightError.
        """
        directory = config.critic.path or config.model.path
        optimizer = config.critic if trainable else None
        super().__init__(config, groups, Path(directory), read_critic(directory), ValueHead(), optimizer, valued=True)
        self.scale = ValueScale()

    def values(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """[T_local] V of each micro-batch in the rewards' units: at position t, of the state before token t + 1. Empty
        but on the last stage."""
        return [self.scale.mean + self.scale.std * values_T for (values_T,) in self.outputs(batches)]

    def weights(
        self, *, copies: bool = True, host: bool = True, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``Network.weights``, with a value head that gives values in the rewards' units."""
        for name, tensor in super().weights(copies=copies, host=host, only=only):
            yield name, in_reward_units(name, tensor, self.scale.mean, self.scale.std)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.scale)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = ValueScale(**state)
