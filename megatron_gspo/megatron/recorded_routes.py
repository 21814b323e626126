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
    """[T_local] on the CPU: how far the choice is from another one, in what it is made by: the K-th largest logit
    less the next one (of sigmoids with their bias, and of groups of experts too, where the router has them); infinity
    when every expert is chosen."""


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
        logits_TE = router.gating(inputs[0]).reshape(chosen_TE.shape).double()
        margin_T = _margin(router, logits_TE)
        experts_TK = chosen_TE.nonzero()[:, 1].view(len(chosen_TE), -1)
        into.append(Routes(router.layer_number - 1, experts_TK.cpu(), margin_T.cpu()))

    return record


def _margin(router: TopKRouter, logits_TE: torch.Tensor) -> torch.Tensor:
    """[T] as in ``Routes``."""
    scores_TE, settings = logits_TE, router.config
    if settings.moe_router_score_function == "sigmoid":
        scores_TE = logits_TE.sigmoid() + (0.0 if router.expert_bias is None else router.expert_bias)
    margin_T = scores_TE.new_full((len(scores_TE),), torch.inf)
    if kept := settings.moe_router_group_topk:
        grouped_TGE = scores_TE.view(len(scores_TE), settings.moe_router_num_groups, -1)
        groups_TG = grouped_TGE.topk(router.topk // kept, dim=-1).values.sum(-1)
        margin_T = _gap(groups_TG, kept)
        outside_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter(1, groups_TG.topk(kept, dim=1).indices, False)
        scores_TE = grouped_TGE.masked_fill(outside_TG[..., None], -torch.inf).flatten(1)
    return torch.minimum(margin_T, _gap(scores_TE, router.topk))


def _gap(values: torch.Tensor, count: int) -> torch.Tensor:
    """[T, n] -> [T]: the ``count``-th largest less the next one; infinity when there is none."""
    if count == values.shape[1]:
        return values.new_full((len(values),), torch.inf)
    best = values.topk(count + 1, dim=1).values
    return best[:, count - 1] - best[:, count]
