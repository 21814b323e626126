"""The head of a model that ties it to the embedding, for an engine that holds it apart."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_gspo.sync.base import NamedTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_head(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
    """The stream, and the embedding once more as the head, in memory of its own: files hold no tensor twice."""
    for name, tensor in tensors:
        yield name, tensor
        if name == EMBEDDING:
            yield HEAD, tensor.clone()
