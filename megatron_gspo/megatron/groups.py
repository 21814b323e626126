"""Process groups, made once, in a frozen object whose every field is set.

``make_groups`` is the only caller of Megatron's ``initialize_model_parallel``; everything else gets its groups from
the object. None never stands for a group: torch reads None as the whole world.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gspo.config import ParallelConfig
from megatron_gspo.errors import LayoutError
from megatron_gspo.megatron import cpu
from megatron_gspo.parallel.rendezvous import join_world
from megatron_gspo.platforms import here
from megatron_gspo.types import Shard


@dataclass(frozen=True)
class Groups:
    """The groups of one rank, and its place in each. Ranks are ordered tensor, context, data, pipeline."""

    world: dist.ProcessGroup
    """All ranks, over gloo and without a timeout to speak of: here they wait while leaders fetch rollouts. The watchdog
    (``parallel.watchdog``) knows those who do from those who are gone."""
    tensor: dist.ProcessGroup
    """Ranks that share each matrix of a layer (and, by sequence parallelism, the tokens between layers)."""
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    """Ranks that hold the same part of the model and different sequences."""
    context: dist.ProcessGroup
    """Ranks that hold the same part of the model and different tokens of the same sequences."""
    data_context: dist.ProcessGroup
    """data x context: ranks that hold the same dense parameters, over which their gradients are summed."""
    token: dist.ProcessGroup
    """tensor x context, tensor first: the ranks among which one micro-batch's tokens are spread."""
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    """Ranks that hold the same experts."""
    replica: dist.ProcessGroup
    """tensor x context x pipeline: the ranks that see the same sequences; the first is the data-parallel leader."""
    tensor_data: dist.ProcessGroup
    """All ranks of one pipeline stage (tensor x context x data), across which per-token sums are completed."""
    megatron: ProcessGroupCollection
    """The same, as Megatron wants them."""

    @property
    def data_rank(self) -> int:
        """Of this replica among all."""
        return self.data.rank()

    @property
    def data_size(self) -> int:
        """Replicas."""
        return self.data.size()

    @property
    def shard(self) -> Shard:
        """Which of a micro-batch's tokens this rank stores."""
        return Shard(self.tensor.rank(), self.tensor.size(), self.context.rank(), self.context.size())

    @property
    def is_leader(self) -> bool:
        """Whether this rank fetches rollouts for its replica."""
        return self.replica.rank() == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether it has the embedding."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the head."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def leader_rank(self) -> int:
        """Global rank of this replica's leader."""
        return dist.get_global_rank(self.replica, 0)

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline, self.pipeline.size() - 1)

    @property
    def last_stage_leader_rank(self) -> int:
        """Global rank of the first of this replica's ranks on the last stage; the same for the whole replica."""
        return dist.get_global_rank(self.replica, self.replica.size() - self.token.size())


def device() -> torch.device:
    """The device that this rank computes on."""
    return cpu.CPU if here().stands_in else torch.device("cuda", torch.cuda.current_device())


def start_distributed(timeout_s: float = 1800.0) -> None:
    """Joins the world of the launcher or of torchrun: nccl with CUDA, gloo without; once."""
    cpu.install()
    if dist.is_initialized():
        return
    if here().one_rank_a_device:
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise LayoutError(f"rank {local} of this machine has no GPU: there are {devices}, and nccl needs one each")
        torch.cuda.set_device(local)
    join_world(here().backend, timedelta(seconds=timeout_s))


def make_groups(parallel: ParallelConfig) -> Groups:
    """Makes the groups of a layout over the running world.

    Raises LayoutError, showing the product, when the layout does not fill the world.
    """
    cpu.install()
    parallel.data_size(dist.get_world_size())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,  # ours over gloo is ``Groups.world``
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        world=dist.new_group(backend="gloo", timeout=timedelta(days=7)),
        tensor=collection.tp,
        pipeline=collection.pp,
        data=collection.dp,
        context=collection.cp,
        data_context=collection.dp_cp,
        token=collection.tp_cp,
        expert=collection.ep,
        expert_data=collection.expt_dp,
        replica=_replica_group(parallel),
        tensor_data=collection.tp_dp_cp,
        megatron=collection,
    )


def _replica_group(parallel: ParallelConfig) -> dist.ProcessGroup:
    """This rank's tensor x context x pipeline group (Megatron's "model parallel" group has no context)."""
    data = parallel.data_size(dist.get_world_size())
    ranks = np.arange(dist.get_world_size()).reshape(parallel.pipeline, data, parallel.context * parallel.tensor)
    # Every rank takes part in the making of every group.
    groups = [dist.new_group(ranks[:, replica].ravel().tolist()) for replica in range(data)]
    return groups[dist.get_rank() // (parallel.context * parallel.tensor) % data]
