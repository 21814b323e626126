"""How evenly tokens spread over experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_gspo.megatron.model import PolicyModel


class ExpertLoad:
    """Counts the tokens that each of a stage's routers sends to each expert, in training passes.

    Only tokens of real responses count, each once: neither padding, nor dummies, nor a recompute.
    """

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        routers = [(chunk, module) for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        self._counts: list[torch.Tensor | None] = [None] * len(routers)
        self._counting = False
        for layer, (chunk, router) in enumerate(routers):
            router.register_forward_hook(self._hook(chunk, layer))

    def start(self) -> None:
        """Counts from zero until ``stop``."""
        self._counts, self._counting = [None] * len(self._counts), True

    def stop(self) -> torch.Tensor:
        """[layers of this stage, experts] float64 counts of this rank's tokens; [0] without an MoE layer."""
        self._counting = False
        counts = [count for count in self._counts if count is not None]
        return torch.stack(counts).double() if counts else torch.zeros(0, dtype=torch.float64)

    def _hook(self, chunk: PolicyModel, layer: int):  # type: ignore[no-untyped-def]  # torch's hook type is not public
        def count(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            counted_T = chunk.counted_T
            if self._counting and counted_T is not None:
                tokens = (outputs[1].detach() & counted_T[:, None]).sum(dim=0)
                before = self._counts[layer]
                self._counts[layer] = tokens if before is None else before + tokens

        return count
