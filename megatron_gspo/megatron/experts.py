"""The MoE layer, and a layer's experts as two weights, [local experts, out, in] each.

The layer is Megatron's, with its router, shared expert and recompute; how tokens travel (``parallel.dispatch``) and the
product (``parallel.grouped``) are ours. ``model.kernels = "reference"`` takes Megatron's ``SequentialMLP``, a module an
expert, in place of ``GroupedExperts``. Names in Hugging Face and in checkpoints are the same for both, and each loads
what the other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from megatron_gspo.kernels.swiglu import swiglu
from megatron_gspo.parallel.dispatch import from_experts, plan_dispatch, probs_to_experts, to_experts
from megatron_gspo.parallel.grouped import Runs, grouped_linear

Offsets = Sequence[tuple[int, int, int]]


class OrderedMoELayer(MoELayer):
    """Megatron's MoE layer, whose tokens go to experts and come back by ``parallel.dispatch``, in one order always."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        megatrons = self.__dict__.pop("token_dispatcher")  # no token takes it, and what would ask for it fails
        self.expert_group, self.shards = megatrons.tp_ep_group, megatrons.tp_size

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[T_local, 1, H] -> the same shape, and no bias."""
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._mixture, False, hidden_states), None
        return self._mixture(hidden_states), None

    def _mixture(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shared = self.shared_experts_compute(hidden_states)
        probs_TE, chosen_TE = self.route(hidden_states)
        plan = plan_dispatch(chosen_TE, self.config.moe_router_topk, self.expert_group, self.shards)
        rows_NH = to_experts(hidden_states.view(-1, hidden_states.shape[-1]), plan)
        out_NH, _ = self.experts(rows_NH, plan.counts_e, probs_to_experts(probs_TE, plan))
        mixture = from_experts(out_NH, plan).view(hidden_states.shape)
        return mixture if shared is None else mixture + shared


class GroupedExperts(torch.nn.Module):
    """SwiGLU experts of one rank: ``linear_fc1.weight`` [e, 2 I, H] is gate over up, ``linear_fc2.weight`` [e, H, I].

    I is this expert-tensor rank's share of an expert's rows.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        kernel: str = "torch",
        **_: Any,
    ) -> None:
        """``kernel`` is ``swiglu``'s."""
        super().__init__()
        self.groups, self.kernel = pg_collection, kernel
        rows = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = GroupedLinear(config, num_local_experts, 2 * rows, config.hidden_size)
        self.linear_fc2 = GroupedLinear(config, num_local_experts, config.hidden_size, rows)
        self.num_local_experts = num_local_experts
        self.register_load_state_dict_post_hook(_forget_nothing)

    def forward(
        self, rows_NH: torch.Tensor, counts_e: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[N, H] rows, ``counts_e`` of each expert in turn -> [N, H], weighted by ``probs_N``; and no bias."""
        runs = Runs(counts_e)
        gate_up = self.linear_fc1(rows_NH, runs)
        return self.linear_fc2(swiglu(gate_up, probs_N, self.kernel), runs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The places that Megatron gives to experts one by one, a block of all local ones each."""
        groups, key = self.groups, f"{prefix}experts."
        replica = (0, 0, groups.expt_dp.rank())
        axis = len(sharded_offsets)
        tensor, size = groups.expt_tp.rank(), groups.expt_tp.size()

        def block(key: str, weight: torch.Tensor, cut: tuple[int, int, int], replica_id: Any) -> ShardedTensor:
            experts = (axis, groups.ep.rank(), groups.ep.size())
            offsets = (*sharded_offsets, experts, cut)
            return ShardedTensor.from_rank_offsets(key, weight, *offsets, replica_id=replica_id, prepend_axis_num=axis)

        def halves(key: str, weight: torch.Tensor, replica_id: Any, flat: slice | None) -> list[ShardedTensor]:
            gate, up = weight.chunk(2, dim=1)
            cuts = (tensor, size + tensor)
            return [
                block(key, half, (axis + 1, cut, 2 * size), replica_id)
                for half, cut in zip((gate, up), cuts, strict=True)
            ]

        def joined(halves: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat(list(halves), dim=1)

        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        return {
            f"{prefix}linear_fc1.weight": ShardedTensorFactory(f"{key}linear_fc1.weight", fc1, halves, joined, replica),
            f"{prefix}linear_fc2.weight": block(f"{key}linear_fc2.weight", fc2, (axis + 2, tensor, size), replica),
            **self._nothing_of_experts(key, sharded_offsets, replica),
        }

    def _nothing_of_experts(self, key: str, offsets: Offsets, replica: tuple[int, int, int]) -> dict[str, Any]:
        """What Megatron's own modules keep beside each weight, in which there is nothing: they ask for it."""
        first, count = self.groups.ep.rank() * self.num_local_experts, self.groups.ep.size() * self.num_local_experts
        return {
            f"{key}{first + expert}.{name}._extra_state": make_sharded_object_for_checkpoint(
                None,
                f"{key}{name}._extra_state",
                (*offsets, (len(offsets), first + expert, count)),
                (0, self.groups.expt_tp.rank(), replica[2]),
            )
            for name in ("linear_fc1", "linear_fc2")
            for expert in range(self.num_local_experts)
        }


def _forget_nothing(module: torch.nn.Module, keys: Any) -> None:
    """``load_state_dict`` meets what ``_nothing_of_experts`` asked for, and knows no such names."""
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if not key.endswith("._extra_state")]


class GroupedLinear(torch.nn.Module):
    """``weight`` [experts, out, in], without values."""

    def __init__(self, config: TransformerConfig, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(experts, outputs, inputs, dtype=config.params_dtype, device=device)
        )

    def forward(self, rows: torch.Tensor, runs: Runs) -> torch.Tensor:
        """[N, in] -> [N, out], each row by its expert's weight."""
        return grouped_linear(rows, self.weight, runs)
