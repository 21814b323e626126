"""What a rank will hold, in bytes, from the configuration alone: the whole sum, term by term.

Weights, gradients and optimizer state are counted exactly. Activations and logprobs are a count of the tensors that
autograd keeps for the layers of ``megatron.spec`` and ``parallel.logprobs``; what they miss is small against them. A
rank also needs its process (Python, torch and Megatron on a CPU; context and NCCL buffers on a GPU), which is not in
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

from megatron_gspo.batching.planning import padded_length
from megatron_gspo.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_gspo.doctor.in_flight import most_in_flight
from megatron_gspo.doctor.tensors import HEAD, Elements, Tensor, elements_of_stage, stage_of
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.layout import stage_layers
from megatron_gspo.kernels.choice import Machine, choose_kernels
from megatron_gspo.kernels.tiles import COLUMNS
from megatron_gspo.types import DTYPES

ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank."""

    weights: int
    """Adapters among them."""
    gradients: int
    """fp32 for a bfloat16 model, else in the model's dtype."""
    optimizer: int
    """Adam's two moments, and the fp32 master weights of a bfloat16 model; a share of 1 / data-parallel ranks. In host
    memory with ``optimizer.offload``."""
    activations: int
    """Of the micro-batches in flight: what backward needs."""
    logprobs: int
    """Tiles of a chunk's logits, and the gradient of a head that is the embedding too."""
    reference: int
    """Weights of the frozen reference policy."""
    critic: int
    """Its weights and gradients: those of the policy, but for the head."""
    critic_states: int
    """Of its optimizer. In host memory with ``critic.offload``."""

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return sum(vars(self).values())

    def on_card(self, config: RunConfig) -> Estimate:
        """Without states that lie in host memory."""
        return replace(
            self,
            optimizer=0 if config.optimizer.offload else self.optimizer,
            critic_states=0 if config.critic.offload else self.critic_states,
        )


def estimate(
    config: RunConfig,
    model: ModelShape,
    tensors: tuple[Tensor, ...],
    *,
    data_size: int,
    stage: int,
    adapters: tuple[Tensor, ...] = (),
    machine: Machine | None = None,
) -> Estimate:
    """What a rank of ``stage`` holds in a training step, each micro-batch as full as its budget allows.

    With ``lora.rank``, ``adapters`` alone have gradients and optimizer states, and a reference is the policy without
    them. ``machine``: whose kernels are taken; this one's unless given.
    """
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    elements = elements_of_stage(tensors, model, parallel, stage)
    trained = elements_of_stage(adapters, model, parallel, stage) if config.lora.rank else elements
    held = elements.total + (trained.total if config.lora.rank else 0)
    accumulated = max(4, item)
    dense_ranks = parallel.context * data_size
    expert_ranks = max(1, parallel.tensor * dense_ranks // (parallel.expert * parallel.expert_tensor))
    last = stage == parallel.pipeline - 1
    valued = tuple(tensor for tensor in tensors if tensor.megatron != HEAD) if config.algorithm.uses_critic else ()
    critic = elements_of_stage(valued, model, parallel, stage)

    def stepped(moved: Elements) -> int:
        return ceil(moved.dense / dense_ranks) + ceil(moved.expert / expert_ranks)

    return Estimate(
        weights=held * item,
        gradients=trained.total * accumulated,
        optimizer=stepped(trained) * _state_bytes(config.optimizer, item),
        activations=_activations(config, model, stage, data_size, machine),
        logprobs=_logprobs(config, model, data_size, machine) if last else 0,
        reference=elements.total * item if config.algorithm.uses_reference and not config.reference_is_base else 0,
        critic=critic.total * (item + accumulated),
        critic_states=stepped(critic) * _state_bytes(config.critic, item),
    )


def _state_bytes(optimizer: OptimizerConfig, item: int) -> int:
    """Of a parameter of ``item`` bytes: two moments and, of a narrow one, a master weight."""
    moment = 2 if optimizer.state_dtype == "bfloat16" else max(4, item)
    return 2 * moment + (4 if item == 2 else 0)


def worst_stage(
    config: RunConfig,
    model: ModelShape,
    tensors: tuple[Tensor, ...],
    data_size: int,
    adapters: tuple[Tensor, ...] = (),
    machine: Machine | None = None,
) -> tuple[int, Estimate]:
    """The pipeline stage whose ranks hold most, and what they hold."""
    stages = {
        stage: estimate(config, model, tensors, data_size=data_size, stage=stage, adapters=adapters, machine=machine)
        for stage in range(config.parallel.pipeline)
    }
    return max(stages.items(), key=lambda item: item[1].total)


def tokens_of_minibatch(config: RunConfig) -> tuple[int, int]:
    """(sequences, tokens) of a mini-batch whose every sequence is as long as allowed."""
    per_prompt = config.rollout.group_size if config.algorithm.draws_responses else 1
    sequences = config.train.prompts_per_step // config.minibatches * per_prompt
    return sequences, sequences * longest_sequence(config)


def longest_sequence(config: RunConfig) -> int:
    """Tokens of a prompt and a response as long as allowed, with what context parallelism fills them up to."""
    return padded_length(config.rollout.max_prompt_tokens + config.rollout.max_response_tokens, config.parallel.context)


def microbatches(config: RunConfig, data_size: int) -> int:
    """Micro-batches a data-parallel rank of a mini-batch whose sequences are as long as allowed."""
    sequences, _ = tokens_of_minibatch(config)
    per_microbatch = max(1, config.train.microbatch_tokens // longest_sequence(config))
    multiple = config.parallel.microbatch_multiple
    return ceil(ceil(ceil(sequences / data_size) / per_microbatch) / multiple) * multiple


def tokens_of_microbatch(config: RunConfig, data_size: int) -> int:
    """Tokens of the largest micro-batch: its budget (or one sequence above it), or all that a rank ever has."""
    _, tokens = tokens_of_minibatch(config)
    return min(max(config.train.microbatch_tokens, longest_sequence(config)), ceil(tokens / data_size))


def _activations(config: RunConfig, model: ModelShape, stage: int, data_size: int, machine: Machine | None) -> int:
    """Of each micro-batch in flight, and of one layer.

    Of a micro-batch and virtual stage: what layers keep, what goes in and comes out behind the last of them, and the
    rotary table of its tokens, which each tensor rank has whole. Then ``recomputed``, and the tokens of all tensor
    ranks, which Megatron gathers into memory that stays.
    """
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    tokens = tokens_of_microbatch(config, data_size) / parallel.context
    kept = [layer.kept(again) for layer, again in layers_of(config, model, stage, data_size, machine)]
    own = item * model.hidden_size / parallel.tensor
    ends = own if choose_kernels(config.model.kernels, config.model.dtype, machine)["norm"] == "triton" else 0.0
    table = max(4, item) * model.head_dim * model.rotary_fraction
    chunks = []
    for count in stage_layers(parallel, model.num_layers)[stage :: parallel.pipeline]:
        chunks.append(ends + table + sum(kept[:count]))
        kept = kept[count:]
    chunks[-1] += ends * (stage == parallel.pipeline - 1)
    held = most_in_flight(chunks, parallel, stage, microbatches(config, data_size))
    gathered = item * model.hidden_size * (parallel.tensor > 1)
    return int(tokens * (held + gathered)) + recomputed(config, model, stage, data_size, machine)


def recomputed(config: RunConfig, model: ModelShape, stage: int, data_size: int, machine: Machine | None = None) -> int:
    """Of the activations, those that backward makes again: one layer's, or those of layers that run again together."""
    tokens = tokens_of_microbatch(config, data_size) / config.parallel.context
    layers = layers_of(config, model, stage, data_size, machine)
    most = max([layer.kept(()) - layer.kept(again) for layer, again in layers], default=0.0)
    return int(tokens * most * (config.model.recompute_layers if config.model.recompute_method == "uniform" else 1))


def layers_of(
    config: RunConfig, model: ModelShape, stage: int, data_size: int, machine: Machine | None = None
) -> list[tuple[LayerBytes, Sequence[str]]]:
    """A stage's layers with their adapters, and what backward runs again of each."""
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    kernels = choose_kernels(config.model.kernels, config.model.dtype, machine)
    count = LayerBytes.fused if kernels["norm"] == "triton" else LayerBytes.of
    tokens = tokens_of_microbatch(config, data_size) / parallel.context
    return [
        (
            count(model, parallel, item, is_moe, kernels["experts"]).adapted(config, model, is_moe, tokens),
            _run_again(config.model, parallel, model, layer),
        )
        for layer, is_moe in enumerate(model.moe_layers)
        if stage_of(layer, model.num_layers, parallel) == stage
    ]


def _run_again(model: ModelConfig, parallel: ParallelConfig, shape: ModelShape, layer: int) -> Sequence[str]:
    """What backward runs again of a layer, for ``LayerBytes.kept``."""
    if model.recompute != "full":
        return model.recompute_modules if model.recompute == "selective" else ()
    ends = list(accumulate(stage_layers(parallel, shape.num_layers)))
    place = layer - max([end for end in ends if end <= layer], default=0)
    return ("layer",) if model.recompute_method == "uniform" or place < model.recompute_layers else ()


INDEX_BYTES = 32
"""Of a token's way to one rank and back (``parallel.dispatch``): four numbers of eight bytes."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that autograd keeps of one layer for one token of the micro-batch, on one rank.

    Counted from the tensors that a layer saves: residuals and the inputs of norms, projections and router (each
    tensor rank its own tokens); query, key, value and what attention makes of them (its own heads); the routed copies
    of a token, evenly spread. Below fp32 a norm keeps two fp32 copies.
    """

    entry: float
    """The layer's input: all that full recompute keeps."""
    attention: float
    """Norms and projections, the input and ``core`` not counted."""
    core: float
    """Attention scores' part that is made again from its inputs."""
    mlp: float
    """MLP or experts without their input: what is made again from it."""

    @classmethod
    def of(cls, model: ModelShape, parallel: ParallelConfig, item: int, is_moe: bool, experts: str) -> LayerBytes:
        """A layer of a model at a layout; ``item`` is the bytes of an activation, ``experts`` the kernel of theirs."""
        hidden, dim, ranks = model.hidden_size, model.head_dim, parallel.tensor
        q, k = model.num_attention_heads * dim, model.num_query_groups * dim
        wide = max(4, item)
        norms = item * 2 * (hidden + q + k)
        if item < 4:  # in place of what they are given: that in fp32, and the same over its root mean square
            norms = (2 * wide - item) * (2 * hidden + q + k)
        linear = item * (3 * hidden + 5 * q + 3 * k) + item * hidden  # the last: what the MLP is given
        core = item * (2 * q + k)
        mlp = 5.0 * item * (model.shared_expert_hidden_size if is_moe else model.ffn_hidden_size)
        if is_moe:
            routing = wide * (2 * model.num_experts + 6 * model.top_k)
            # A routed copy goes to each expert-tensor rank: as many times more as the matrices are narrower. Kept of
            # it are the inputs of both products, what lies between them, and where it came from.
            kept = parallel.expert_tensor * hidden + 3 * model.expert_hidden_size
            if experts == "sequential":
                kept = (1 + parallel.expert_tensor) * hidden + 6 * model.expert_hidden_size
            mlp += routing + model.top_k * (item * kept + INDEX_BYTES * parallel.expert_tensor)
        entry = item * hidden
        return cls(entry / ranks, (norms + linear - core - entry) / ranks, core / ranks, mlp / ranks)

    @classmethod
    def fused(cls, model: ModelShape, parallel: ParallelConfig, item: int, is_moe: bool, experts: str) -> LayerBytes:
        """The same with the kernels of a GPU for half types, counted from what a dry run keeps (docs/dryrun.md).

        Norms keep what they are given, attention query, key, value, result and a float32 sum a score row; a rotated
        query has a copy before it.
        """
        hidden, dim, ranks = model.hidden_size, model.head_dim, parallel.tensor
        heads, context = model.num_attention_heads, parallel.context
        q, k = heads * dim, model.num_query_groups * dim
        keys = k if context == 1 else 2 * k * (context + 0.5)  # gathered, and laid end to end for each run of queries
        core = item * (2 * q + keys) + 4 * heads
        attention = item * (2 * hidden + 2 * q + 2 * k)
        mlp = item * (hidden + 5.0 * (model.shared_expert_hidden_size if is_moe else model.ffn_hidden_size))
        if is_moe:
            copies, local = parallel.expert_tensor, parallel.expert * parallel.expert_tensor > 1
            routing = 4 * model.num_experts + 12 * model.top_k
            rows = item * (copies * (model.hidden_size + 3 * model.expert_hidden_size / copies)) + 4 * copies
            places = 16 + 16 * copies + 16 * copies * local
            mlp += routing + model.top_k * (rows + places)
        return cls(item * hidden / ranks, (attention - item * hidden) / ranks, core / ranks, mlp / ranks)

    def adapted(self, config: RunConfig, model: ModelShape, is_moe: bool, tokens: float) -> LayerBytes:
        """The same with what adapters on every matrix keep; fewer targets keep less.

        Of each product the rank-wide rows between A and B, and A and B as they are put together for a micro-batch of
        ``tokens``: the A of a layer's p matrices below each other, and their B in one matrix with zeros between them
        (``megatron.lora``).
        """
        rank, parallel, item = config.lora.rank, config.parallel, ITEM_BYTES[config.model.dtype]
        if not rank:
            return self
        hidden, ranks, shards = model.hidden_size, parallel.tensor, parallel.expert_tensor
        q, k = (count * model.head_dim for count in (model.num_attention_heads, model.num_query_groups))
        width = model.shared_expert_hidden_size if is_moe else model.ffn_hidden_size
        attention = 3 * hidden + q / ranks + 3 * (q + 2 * k) / ranks + hidden
        mlp = (2 * hidden + width / ranks + 4 * width / ranks + hidden) * bool(width)
        rows = 3 + 1 / ranks, (2 + 1 / ranks) * bool(width)
        if is_moe:
            inner = model.expert_hidden_size / shards
            mlp += model.num_experts / parallel.expert * (3 * hidden + 5 * inner)
            rows = rows[0], rows[1] + 3 * model.top_k * shards / ranks
        return replace(
            self,
            attention=self.attention + item * rank * (attention / tokens + rows[0]),
            mlp=self.mlp + item * rank * (mlp / tokens + rows[1]),
        )

    def kept(self, again: Sequence[str]) -> float:
        """Without what is run again in backward: "layer", or any of "core_attn", "mlp", "moe"."""
        if "layer" in again:
            return self.entry
        core = 0.0 if "core_attn" in again else self.core
        mlp = 0.0 if {"mlp", "moe"} & set(again) else self.mlp
        return self.entry + self.attention + core + mlp


def _logprobs(config: RunConfig, model: ModelShape, data_size: int, machine: Machine | None) -> int:
    """Tiles [chunk, columns]: two in forward; in backward one, its gradient in a half type and the float32 product that
    is added to the head's (Triton writes the gradient alone). The gradient of the hidden states, and that of a head
    which is the embedding of the same stage: any other is added in place. A frozen one has none."""
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    wide, rows = max(4, item), ceil(model.vocab_size / parallel.tensor)
    tokens = ceil(tokens_of_microbatch(config, data_size) / parallel.context)
    chunk = min(config.model.logprob_chunk, tokens)
    columns = min(rows, COLUMNS)
    half = item < 4
    frozen = config.lora.rank > 0
    product = (chunk if frozen else columns) * model.hidden_size * wide
    backward = columns * chunk * item + product if half else 0
    if choose_kernels(config.model.kernels, config.model.dtype, machine)["head"] == "tiles":
        backward = max(2 * wide * chunk * columns, wide * chunk * columns + backward)
    else:
        backward += chunk * model.hidden_size * wide + tokens * model.hidden_size * item // parallel.tensor
    tied = model.tied_embeddings and parallel.pipeline == 1 and not frozen
    return backward + (rows * model.hidden_size * wide if tied else 0)
