"""What a rank's card holds for a while, beside what ``Estimate`` counts, and its fullest moment by both.

Counted, and held against dry runs (docs/dryrun.md) to 5% for half types with Triton's kernels; for float32 and
``model.kernels = "reference"`` it is an upper bound. Not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_gspo.config import ParallelConfig, RunConfig
from megatron_gspo.doctor.estimate import ITEM_BYTES, Estimate, LayerBytes, layers_of, recomputed, tokens_of_microbatch
from megatron_gspo.doctor.tensors import stage_of
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.kernels.choice import Machine, choose_kernels
from megatron_gspo.sync.base import CARD_BUCKET_MB

PIECE = 2**24
"""Elements that ``megatron.adamw`` steps at a time where it brings states to the card or widens them."""


@dataclass(frozen=True)
class Passing:
    """Bytes of a rank that come and go in a step, beside what ``Estimate`` counts; not all at the same time."""

    experts: int
    """Backward of one layer's experts or MLP: rows on their way, gradients, and the product that is added to a weight's
    gradient."""
    attention: int
    """Backward of one layer's attention: gradients of query, key and value, and an fp32 sum of the query's."""
    optimizer: int
    """States that are brought to the card or widened, a piece at a time."""
    gather: int
    """The embedding or the head as a sync gathers it over tensor ranks."""
    bucket: int
    """Of a sync, at most."""
    again: int
    """What recompute makes anew of a layer, which ``Estimate.activations`` has and the head's moment has not."""

    @classmethod
    def of(
        cls, config: RunConfig, model: ModelShape, stage: int, data_size: int, machine: Machine | None = None
    ) -> Passing:
        """Of a stage's ranks, with micro-batches as full as their budget allows and experts evenly loaded."""
        parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
        tokens = tokens_of_microbatch(config, data_size) / parallel.context
        kernels = choose_kernels(config.model.kernels, config.model.dtype, machine)
        kinds = {
            is_moe
            for layer, is_moe in enumerate(model.moe_layers)
            if stage_of(layer, model.num_layers, parallel) == stage
        }
        layers = [layer for layer, _ in layers_of(config, model, stage, data_size, machine)]
        flash = kernels["norm"] == "triton"
        count = _backward_of_mlp if kernels["swiglu"] == "triton" else _widened_mlp
        mlp = max((count(model, parallel, item, is_moe, tokens) for is_moe in kinds), default=0.0)
        if config.lora.rank and True in kinds:  # forward: what the experts give, what their adapters do, and the sum
            rows = model.top_k * parallel.expert_tensor * tokens / parallel.tensor
            mlp = max(mlp, 3 * item * rows * model.hidden_size)
        return cls(
            experts=int(mlp),
            attention=int(tokens * max((_attention(model, parallel, item, each, flash) for each in layers), default=0)),
            optimizer=_pieces(config, model),
            gather=_gather(config, model, stage),
            bucket=(config.sync.bucket_mb or CARD_BUCKET_MB) * 10**6,
            again=recomputed(config, model, stage, data_size, machine),
        )

    @property
    def most(self) -> int:
        """The largest of what comes and goes."""
        return max(self.experts, self.attention, self.optimizer, self.gather)


def peak(needed: Estimate, passing: Passing) -> int:
    """Bytes of a rank at its fullest: in backward, at the head or in a layer, in the optimizer's step, or as a sync
    gathers weights."""
    states = needed.total - needed.activations - needed.logprobs
    backward = needed.activations + max(needed.logprobs - passing.again, passing.experts, passing.attention)
    return states + max(backward, passing.optimizer, passing.gather + min(passing.bucket, needed.weights))


def _backward_of_mlp(model: ModelShape, parallel: ParallelConfig, item: int, is_moe: bool, tokens: float) -> float:
    """Beside what forward keeps of the layer, which is all there when its backward begins.

    Of experts the fullest of three: rows of the gradient on their way (sent, received and put in order, before the
    first are let go), the backward of the second product, and that of the first, with what is let go by then.
    """
    own = tokens / parallel.tensor
    if not is_moe:
        return item * (own * (model.hidden_size + 3 * model.ffn_hidden_size))
    ranks, local = parallel.expert * parallel.expert_tensor, model.num_experts // parallel.expert
    rows = item * own * model.top_k * parallel.expert_tensor * model.hidden_size
    middle = item * own * model.top_k * model.expert_hidden_size
    weight = _weight(model, parallel, item)
    on_the_way = rows * (1 if ranks == 1 else 3 if local > 1 else 2)
    return max(on_the_way, rows + middle + weight, rows - middle + 2 * weight) + item * own * model.hidden_size


def _widened_mlp(model: ModelShape, parallel: ParallelConfig, item: int, is_moe: bool, tokens: float) -> float:
    """The same of torch's operations, which widen half types: gradients of a routed copy before and after each
    exchange, of both projections, and its sum; gate, up, both gradients and what lies between, and the copy."""
    if not is_moe:
        return tokens * 3 * item * model.ffn_hidden_size / parallel.tensor
    copy = item * 3 * (parallel.expert_tensor * model.hidden_size + model.expert_hidden_size)
    if item < 4:
        copy += 4 * (8 * model.expert_hidden_size + parallel.expert_tensor * model.hidden_size)
    total = model.top_k * (copy + max(4, item) * model.hidden_size)
    return tokens * (total + 3 * item * model.shared_expert_hidden_size) / parallel.tensor


def _attention(model: ModelShape, parallel: ParallelConfig, item: int, layer: LayerBytes, flash: bool) -> float:
    """Of a token: gradients of query, key and value, and an fp32 sum of the query's.

    Flash attention's kernel also makes gradients of key and value for each query head; what the layer's MLP kept is let
    go by then.
    """
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    if not flash:
        return (item * (2 * q + 2 * k) + max(4, item) * q) / parallel.tensor
    keys = 1.0 if parallel.context == 1 else parallel.context + 0.5
    inside = 4 * q + 2 * item * q * keys * (q > k)
    return (item * (2 * q + 2 * k * keys) + inside) / parallel.tensor - layer.mlp


def _gather(config: RunConfig, model: ModelShape, stage: int) -> int:
    """The embedding or the head, beside the pieces that it is put together from."""
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    if stage not in (0, parallel.pipeline - 1):
        return 0
    return model.vocab_size * model.hidden_size * item * (1 + (parallel.tensor > 1))


def _pieces(config: RunConfig, model: ModelShape) -> int:
    """Of the largest parameter, a piece of its states: brought to the card (weight and moments in float32), widened
    (moments), and rounded again (numbers drawn, and their sum with a moment)."""
    parallel = config.parallel
    steppers = [config.optimizer, *([config.critic] if config.algorithm.uses_critic else [])]
    narrow, offload = (any(each.state_dtype != "float32" for each in steppers), any(each.offload for each in steppers))
    largest = model.vocab_size * model.hidden_size // parallel.tensor
    if model.num_experts:
        largest = max(largest, 2 * _weight(model, parallel, 1))
    brought = 12 if offload else 8 * narrow
    return min(PIECE, largest) * (brought + 8 * narrow)


def _weight(model: ModelShape, parallel: ParallelConfig, item: int) -> int:
    """One matrix of each of a rank's experts: a third of their weights."""
    return (
        ceil(model.num_experts / parallel.expert * model.expert_hidden_size / parallel.expert_tensor)
        * model.hidden_size
        * item
    )
