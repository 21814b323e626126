"""The policy: a model that gives logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_gspo.config import RunConfig
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.layout import check_replay
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.heads import LogprobHead
from megatron_gspo.megatron.network import Network
from megatron_gspo.types import PackedBatch


class Policy(Network):
    """What is trained, or a frozen reference of it. Its objective takes (index, logprobs [T_local], entropy [T_local]).

    Methods are collective, as those of ``Network``.
    """

    def __init__(self, config: RunConfig, groups: Groups, *, path: str | None = None, trainable: bool = True) -> None:
        """Builds the model at ``path`` and loads this rank's weights. Without a path it is the one at ``model.path``,
        with the adapters of ``[lora]``.

        Raises ConfigError, LayoutError or WeightError.
        """
        directory = path or config.model.path
        model = read_model(directory)
        if trainable:
            check_replay(config.replay, model[1])
        head = LogprobHead(config.rollout.temperature if config.algorithm.draws_responses else 1.0)
        super().__init__(
            config,
            groups,
            Path(directory),
            model,
            head,
            config.optimizer if trainable else None,
            lora=config.lora if path is None else None,
        )

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(logprobs, entropy) of each micro-batch, the tokens of ``groups.shard``; empty but on the last stage."""
        return [(logprobs_T, entropy_T) for logprobs_T, entropy_T in self.outputs(batches)]


class BasePolicy:
    """The policy as training found it, by the policy's own weights with its adapters left out: no second copy."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.replay = policy, policy.replay

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As ``Policy.logprobs``. Collective."""
        with self.policy.without_adapters():
            return self.policy.logprobs(batches)
