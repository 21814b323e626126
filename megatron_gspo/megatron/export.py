"""The policy's weights and gradients in Hugging Face names, streamed: one gather over tensor ranks per parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_gspo.hf.family import Family
from megatron_gspo.hf.weights import NamedRule, put_together
from megatron_gspo.megatron.model import Own, PolicyModel
from megatron_gspo.parallel.exchange import gather_pieces

EMBEDDING = ("model.embed_tokens.weight",)


def weight_of(own: Own) -> torch.Tensor:
    """The live tensor."""
    return own.data


def gradient_of(own: Own) -> torch.Tensor | None:
    """The accumulated gradient, in DDP's buffer; whole only after ``complete_gradients``. A buffer has none."""
    if not isinstance(own.parameter, torch.nn.Parameter):
        return None
    return own.of(own.parameter.main_grad)  # type: ignore[attr-defined]


Named = Iterator[tuple[Own, NamedRule]]


def stream_weights(
    chunks: Sequence[PolicyModel],
    family: Family,
    *,
    copies: bool = True,
    host: bool = True,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights as ``stream_tensors`` yields them, with adapters merged in; of them ``only`` some names."""
    for chunk in chunks:
        rules = chunk.rules(family)
        yield from _stream(chunk, rules, weight_of, _merged_by(chunk), copies=copies, host=host, only=only)


def stream_tensors(
    chunks: Sequence[PolicyModel],
    rules: Callable[[PolicyModel], Named],
    value: Callable[[Own], torch.Tensor | None] = weight_of,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) on the rank that owns each tensor, nothing elsewhere; every rank must exhaust it.

    The owner is the first of the ranks that hold the same parameter: tensor rank 0 of context and data rank 0 of its
    pipeline stage, and for an expert, rank 0 of those that hold the same expert.
    """
    for chunk in chunks:
        yield from _stream(chunk, rules(chunk), value, _as_it_is)


def _as_it_is(name: str, piece: torch.Tensor) -> torch.Tensor:
    return piece


def _merged_by(chunk: PolicyModel) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return _as_it_is if chunk.lora is None else chunk.lora.merged


@torch.no_grad()
def _stream(
    model: PolicyModel,
    rules: Named,
    value: Callable[[Own], torch.Tensor | None],
    finish: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    copies: bool = True,
    host: bool = True,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors are on the CPU; without ``host``, where the model is. Without ``copies``, what lies there whole comes as
    a view of live memory."""
    groups = model.groups
    for own, named in rules:
        if model.shape.tied_embeddings and named.hf_names == EMBEDDING and not model.pre_process:
            continue  # the tied head of a last stage is the embedding of the first
        expert = named.rule.is_expert
        tensor = groups.megatron.expt_tp if expert else groups.tensor
        replicas = groups.expert_data if expert else groups.data_context
        mine = value(own)
        if replicas.rank() != 0 or mine is None:
            continue  # every tensor rank of a replica skips the same ones
        for name, piece in zip(named.hf_names, named.rule.split(mine), strict=True):
            if only is not None and name not in only:
                continue
            piece = finish(name, piece)
            pieces = [piece] if named.rule.cut == "whole" else gather_pieces(piece, tensor)
            whole = put_together(pieces, named.rule.cut, model.shape.vocab_size)
            if tensor.rank() == 0:
                yield name, whole.to("cpu" if host else whole.device, copy=copies).contiguous()


@torch.no_grad()
def complete_gradients(ddp: DistributedDataParallel) -> None:
    """Makes every rank's gradient buffers whole.

    The distributed optimizer leaves each data-parallel rank with the reduced gradients of its own share of a bucket
    and unreduced ones elsewhere; an all-gather of the shares puts the rest right.
    """
    for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            share = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, share, group=ranks)
