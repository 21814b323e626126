"""What a stage's routers used, micro-batch by micro-batch, and by how much they chose it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class Routes:
    """One router's choices in one micro-batch, for the rows of this rank."""

    layer: int
    """Over all stages, from 0."""
    experts_TK: torch.Tensor
    """[T_local, K] int64 on the CPU, ascending in a row."""
    margin_T: torch.Tensor
    """[T_local] on the CPU: the K-th largest logit less the next one; infinity when every expert is chosen."""


@contextmanager
def record_routes(chunks: Sequence[torch.nn.Module]) -> Iterator[list[list[Routes]]]:
    """Collects choices within it: one list a router, of one entry a micro-batch. For forward passes: a recompute
    would be recorded too."""
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    found: list[list[Routes]] = [[] for _ in routers]
    hooks = [router.register_forward_hook(_hook(into)) for router, into in zip(routers, found, strict=True)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _hook(into: list[Routes]):  # type: ignore[no-untyped-def]  # torch's hook type is not public
    @torch.no_grad()
    def record(router: TopKRouter, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        chosen_TE = outputs[1]
        top = router.topk
        logits_TE = router.gating(inputs[0]).reshape(chosen_TE.shape).double()
        if top < logits_TE.shape[1]:
            best = logits_TE.topk(top + 1, dim=1).values
            margin_T = best[:, top - 1] - best[:, top]
        else:
            margin_T = logits_TE.new_full((len(logits_TE),), torch.inf)
        experts_TK = chosen_TE.nonzero()[:, 1].view(len(chosen_TE), -1)
        into.append(Routes(router.layer_number - 1, experts_TK.cpu(), margin_T.cpu()))

    return record
