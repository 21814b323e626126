"""A Hugging Face model as a Megatron ``GPTModel`` whose last stage hands its hidden states to a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.batching.packing import zigzag_positions
from megatron_gspo.config import ModelConfig, ParallelConfig
from megatron_gspo.errors import WeightError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import stage_layers
from megatron_gspo.hf.lora import INSIDE
from megatron_gspo.hf.weights import NamedRule, WeightRule, find_rule, padded_vocab_size, take_piece
from megatron_gspo.kernels.choice import choose_kernels
from megatron_gspo.megatron.attention import packed_sequences
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.megatron.heads import Head, ValueOutput
from megatron_gspo.megatron.rotary import scale_amplitudes, scale_angles
from megatron_gspo.megatron.spec import block_spec
from megatron_gspo.platforms import here
from megatron_gspo.types import DTYPES, PackedBatch

if TYPE_CHECKING:
    from megatron_gspo.megatron.lora import Lora

GROUPED = ".mlp.experts.linear_"
"""Stands in the names of what is one parameter for all experts of a layer."""
_GRAPHED = "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope"
"""0.19.2's name, and 0.16.1's, of what a CUDA graph would hold. The default is one that both call deprecated."""


class PolicyModel(GPTModel):
    """One virtual pipeline stage of a model. The last returns what a head makes, others hidden states."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        groups: Groups,
        model: ModelConfig,
        vp_stage: int | None = None,
        *,
        valued: bool = False,
    ) -> None:
        """``valued``: with the parameters of a value head, in the place of those over the vocabulary."""
        rank = groups.pipeline.rank()
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        last = (config.virtual_pipeline_model_parallel_size or 1) - 1
        kernels = choose_kernels(model.kernels, model.dtype)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                list(shape.moe_layers[offset : offset + layers]), config, shape, groups.tensor, kernels
            ),
            vocab_size=padded_vocab_size(shape.vocab_size, groups.tensor.size()),
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage and vp_stage in (None, 0),
            post_process=groups.is_last_stage and vp_stage in (None, last),
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            rotary_percent=shape.rotary_fraction,
            share_embeddings_and_output_weights=shape.tied_embeddings and not valued,
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
        )
        if shape.scaled_rope is not None:
            scale_angles(self.rotary_pos_emb, shape)
        if self.post_process and valued:
            self.output_layer = ValueOutput(
                shape.hidden_size, config.params_dtype, sequence_parallel=config.sequence_parallel
            )
        self.shape, self.groups, self.chunk = shape, groups, model.logprob_chunk
        self.kernels = kernels
        self.layer_offset = offset
        self.lora: Lora | None = None
        """Its adapters, where it has any: then they are all that is trained."""
        self.counted_T: torch.Tensor | None = None
        """[T_local] bool, while ``forward`` runs: this rank's tokens that are neither padding nor a dummy's."""

    def vocabulary_weight(self) -> torch.Tensor:
        """[V_padded / tensor, H] of the last stage: what hidden states become logits by."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def forward(self, batch: PackedBatch, head: Head) -> torch.Tensor:
        """Runs this stage on a packed micro-batch; the input of a later stage comes by ``set_input_tensor``."""
        shard = self.groups.shard
        boundaries = batch.cu_seqlens.cpu()  # the one read of a micro-batch's lengths
        own = zigzag_positions(boundaries, shard.context_size, shard.context_rank).to(batch.tokens_T.device)
        counted_T = expand(batch.weights_S > 0, batch.sequence_T)[own]
        self.counted_T = counted_T.view(shard.tensor_size, -1)[shard.tensor_rank]
        hidden = super().forward(
            input_ids=batch.tokens_T[own][None],
            position_ids=None,  # from the boundaries and the context rank, as the order of ``own`` has it
            attention_mask=None,
            packed_seq_params=packed_sequences(boundaries, shard, self.config, own.device, self.kernels["rotary"]),
        )
        self.counted_T = None
        if not self.post_process:
            return hidden
        return head(self, batch.labels_T[own], hidden[:, 0])

    def _postprocess(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """[T_local, 1, H] of the last layer, without the logits that Megatron would make of them."""
        return hidden_states

    def rules(self, family: Family) -> Iterator[tuple[Own, NamedRule]]:
        """Every parameter of this stage's model with its Hugging Face names, in an order that tensor ranks share.

        Experts that are one parameter come one by one. Behind all of them the routers' expert biases, which are
        buffers: without gradient, and no optimizer moves them.
        """
        parameters = [(name, parameter) for name, parameter in self.named_parameters() if INSIDE not in name]
        biases = [(name, buffer) for name, buffer in self.named_buffers() if name.endswith(".expert_bias")]
        return self._find_rules(family.rules(self.shape), (*parameters, *biases))

    def adapter_rules(self) -> Iterator[tuple[Own, NamedRule]]:
        """Every parameter of this stage's adapters likewise; none without any."""
        rules = () if self.lora is None else self.lora.rules
        return self._find_rules(rules, [(n, parameter) for n, parameter in self.named_parameters() if INSIDE in n])

    def trained_rules(self, family: Family) -> Iterator[tuple[Own, NamedRule]]:
        """Of what training changes: the adapters where there are any, else the model."""
        return self.rules(family) if self.lora is None else self.adapter_rules()

    def _find_rules(
        self, rules: Sequence[WeightRule], parameters: Sequence[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[Own, NamedRule]]:
        experts = self.shape.num_experts // self.groups.expert.size()
        for name, parameter in parameters:
            for own, own_name in _one_by_one(name, parameter):
                yield own, find_rule(rules, self._global_name(own_name, experts * self.groups.expert.rank()))

    def _global_name(self, name: str, expert_offset: int) -> str:
        """A local parameter name with its layer and expert numbered over all stages and expert ranks."""
        parts = name.split(".")
        for position, word in enumerate(parts[:-1]):
            if word == "layers":
                parts[position + 1] = str(int(parts[position + 1]) + self.layer_offset)
            elif word == "local_experts":
                parts[position + 1] = str(int(parts[position + 1]) + expert_offset)
        return ".".join(parts)


@dataclass(frozen=True)
class Own:
    """What this rank has of a parameter in Hugging Face names: all of it, or of all experts' one expert's part.

    ``Own(weight, 3).of(weight.main_grad)`` is the gradient [out, in] of the fourth expert here.
    """

    parameter: torch.Tensor
    """The whole parameter, or a buffer."""
    expert: int | None = None
    """Its place among those of this rank."""

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a tensor in the parameter's shape, the part that this is: a view."""
        return whole if self.expert is None else whole[self.expert]

    @property
    def data(self) -> torch.Tensor:
        """The live values: a view."""
        return self.of(self.parameter.data)


def _one_by_one(name: str, parameter: torch.Tensor) -> Iterator[tuple[Own, str]]:
    """A parameter under its name; experts that are one parameter under the names that they have one by one."""
    layer, experts, weight = name.partition(GROUPED)
    if not experts:
        yield Own(parameter), name
        return
    for expert in range(len(parameter)):
        yield Own(parameter, expert), f"{layer}.mlp.experts.local_experts.{expert}.linear_{weight}"


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, shape: ModelShape, groups: Groups, *, deterministic: bool = False
) -> TransformerConfig:
    """The shape and the layout as Megatron's configuration; everything that could change a step is named here."""
    dtype = DTYPES[model.dtype]
    tensor = groups.tensor.size()
    moe = {} if not shape.num_experts else _moe_settings(model, shape)
    kind = MLATransformerConfig if shape.megatron.get("multi_latent_attention") else TransformerConfig
    config = kind(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        # Dropout is 0.1 by default, and would make pi_old and pi_theta differ at equal weights.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        **_pipeline_settings(parallel, shape.num_layers),
        context_parallel_size=groups.context.size(),
        expert_model_parallel_size=groups.expert.size(),
        expert_tensor_parallel_size=groups.megatron.expt_tp.size(),
        # Micro-batches are packs of uneven length, and ``pipeline`` tells the schedule their shapes. (Megatron then
        # wants this dispatcher even of a dense model.)
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        # Each loss is a part of a globally normalised sum: nothing is divided by counts, micro-batches or ranks.
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=choose_kernels(model.kernels, model.dtype)["gradients"] == "fused",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=deterministic or here().deterministic,
        **_recompute_settings(model),
        recompute_modules=list(model.recompute_modules),
        **{_GRAPHED: []},
        **moe,
        **{name: value for name, value in shape.megatron.items() if shape.num_experts or not name.startswith("moe_")},
    )
    scale_amplitudes(config, shape)
    return config


def _recompute_settings(model: ModelConfig) -> dict[str, object]:
    """``model.recompute`` in Megatron's words."""
    if model.recompute == "full":
        layers = {"recompute_method": model.recompute_method, "recompute_num_layers": model.recompute_layers}
        return {"recompute_granularity": "full", **layers}
    return {} if model.recompute == "off" else {"recompute_granularity": "selective"}


def _pipeline_settings(parallel: ParallelConfig, num_layers: int) -> dict[str, object]:
    """Stages with their layers spelled out, so that even, uneven and virtual ones are one case."""
    if parallel.pipeline == 1:
        return {"pipeline_model_parallel_size": 1}
    stages = [["decoder"] * layers for layers in stage_layers(parallel, num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "pipeline_model_parallel_layout": stages,
    }


def _moe_settings(model: ModelConfig, shape: ModelShape) -> dict[str, object]:
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.top_k,
        "moe_ffn_hidden_size": shape.expert_hidden_size,
        "moe_shared_expert_intermediate_size": shape.shared_expert_hidden_size or None,
        "moe_layer_freq": [int(is_moe) for is_moe in shape.moe_layers],
        "moe_grouped_gemm": False,  # names modules of Megatron's; ``spec`` has ours
        # Hugging Face configurations carry an auxiliary loss of 0.001; it would make a step depend on the layout.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_expert_capacity_factor": None,  # dropless
        "moe_router_dtype": "fp64" if model.dtype == "float64" else "fp32",
        "moe_router_fusion": False,
        "moe_permute_fusion": False,
    }


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    family: Family,
    shape: ModelShape,
    groups: Groups,
    *,
    deterministic: bool = False,
    valued: bool = False,
) -> list[PolicyModel]:
    """This rank's virtual stages in the model's order, with uninitialised weights, on this rank's device."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)  # only dropout would draw, and there is none
    config = transformer_config(model, parallel, shape, groups, deterministic=deterministic)
    virtual: list[int | None] = list(range(parallel.virtual_pipeline)) if parallel.virtual_pipeline > 1 else [None]
    chunks = [PolicyModel(config, shape, groups, model, stage, valued=valued).to(device()) for stage in virtual]
    for chunk in chunks:
        _mark_parameters(chunk, family)
    return chunks


def _mark_parameters(policy: PolicyModel, family: Family) -> None:
    """Sets what DDP and gradient clipping read off a parameter, and Megatron leaves out in two cases.

    ``allreduce = False`` marks an expert. 0.16.1 sets it only at EP > 1; unmarked, DDP reduces experts over the wrong
    ranks at TP > 1 and EP 1, and their gradients are silently wrong.
    ``tensor_model_parallel`` marks a shard. Megatron sets it while it initialises weights, which we do not let it do;
    unmarked, the gradient norm counts tensor rank 0 alone, and every clipped step is silently too long.
    """
    for own, named in policy.rules(family):
        parameter = own.parameter
        if named.rule.is_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
        if named.rule.cut != "whole":
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            dimension = 1 if named.rule.cut == "columns" else 0
            parameter.partition_dim = dimension + (own.expert is not None)  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]


@torch.no_grad()
def load_weights(policy: PolicyModel, family: Family, reader: HfReader) -> None:
    """Fills this rank's parameters from a Hugging Face directory, reading its own pieces.

    Raises WeightError naming a tensor that is missing or mis-shaped.
    """
    for own, named in policy.rules(family):
        parameter = own.data
        group = policy.groups.megatron.expt_tp if named.rule.is_expert else policy.groups.tensor
        if named.rule.starts_at_zero and not set(named.hf_names) <= set(reader.names()):
            parameter.zero_()
            continue
        tensors = [reader.read(name) for name in named.hf_names]
        try:
            pieces = [take_piece(tensor, named.rule.cut, group.rank(), group.size()) for tensor in tensors]
            joined = named.rule.join(pieces)
        except (RuntimeError, IndexError):  # what torch raises for shapes that cannot be cut or joined
            joined = None
        if joined is None or joined.shape != parameter.shape:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(named.hf_names, tensors, strict=True))
            raise WeightError(
                f"{reader.directory}: {shapes} cannot make this rank's {tuple(parameter.shape)}, "
                f"which config.json asks for"
            )
        parameter.copy_(joined.to(parameter.dtype))
